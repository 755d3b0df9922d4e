"""One model, many adapters: each row of a batch its own, and another adapter in the place of one while it serves.

    pip install fastpeft
    python examples/serve_many.py              # --model DIR --steps 40 --rate 1e-2 --compile --out DIR

Three adapters are trained, each to continue with a word of its own. They are loaded into one model, and one `generate`
serves rows that ask for different ones, and rows that ask for none. Then a fourth takes the place of the first by
`hotswap_adapter`: of the model the parameters stay the same objects, so that what `torch.compile` has made of it
(`--compile`, which takes a C++ compiler) is not made again. Every row is compared with the model that has its adapter
alone.
"""

import sys

import torch
import toys

import fastpeft

WORDS = {"athens": " Athens", "berlin": " Berlin", "cairo": " Cairo", "delhi": " Delhi"}
RANKS = {"athens": 4, "berlin": 8, "cairo": 16, "delhi": 2}
PROMPTS = ["Ada went to", "On Monday Ben took the train to", "It was Friday, and Cleo flew to", "Dan went to"]
MOST = 3  # new tokens
NONE = "__base__"  # in place of an adapter's name


def base(options) -> tuple[torch.nn.Module, object]:
    return toys.load("AutoModelForCausalLM", options.model, options.seed)


def train(name: str, options) -> None:
    """Make and save an adapter that continues every prompt with its word."""
    model, tokenizer = base(options)
    rank = RANKS[name]
    fastpeft.patch(model, fastpeft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), options.rate)
    rows = tokenizer([prompt + 2 * WORDS[name] for prompt in PROMPTS], padding=True, return_tensors="pt")
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    for _ in range(options.steps):
        optimizer.zero_grad()
        loss = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
    fastpeft.save_adapter(model, options.out / name)
    print(f"trained {name}, rank {rank}: loss {loss.item():.3f}")


def generated(model, tokenizer, prompts: list[str], names: list[str] | None = None) -> list[str]:
    """What follows each prompt, greedily; `names` says with which adapter, "__base__" with none."""
    rows = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False)
    more = {} if names is None else {"adapter_names": names}
    made = model.generate(**rows, **more, max_new_tokens=MOST, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(made[:, rows["input_ids"].shape[1] :], skip_special_tokens=True)


def alone(name: str, options, prompt: str) -> str:
    """The same of a model that has this adapter only."""
    model, tokenizer = base(options)
    if name != NONE:
        fastpeft.load_adapter(model, options.out / name)
    return generated(model.eval(), tokenizer, [prompt])[0]


def rows_wrong(model, tokenizer, options, files: dict[str, str]) -> int:
    """Serve every prompt with every adapter in one batch; `files` says which one was loaded under which name."""
    asked = [(name, prompt) for name in files for prompt in PROMPTS]
    found = generated(model, tokenizer, [prompt for _, prompt in asked], [name for name, _ in asked])
    expected = [alone(files[name], options, prompt) for name, prompt in asked]
    for (name, prompt), text in list(zip(asked, found, strict=True))[:: len(PROMPTS)]:
        print(f"  {name:8s} ({files[name]}): {prompt}{text}")
    wrong = sum(a != b for a, b in zip(found, expected, strict=True))
    print(f"  {len(asked)} rows in one batch, {wrong} other than alone")
    return wrong


def swap(model, directory, name: str, compiled: bool) -> None:
    """Put another adapter in the place of `name`; where compiled code serves, it is an error to compile again."""
    if not compiled:
        return fastpeft.hotswap_adapter(model, directory, name)
    fast, ids = torch.compile(model, fullgraph=True), torch.arange(5, 17)[None]
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        fast(input_ids=ids)
        fastpeft.hotswap_adapter(fast, directory, name)
        torch.testing.assert_close(fast(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def main(argv: list[str] | None = None) -> int:
    """Everything. Returns 0, or 1 if a row of a batch gets something else than alone."""
    parser = toys.parser("serve_many", __doc__, steps=40, rate=1e-2)
    parser.add_argument("--compile", action="store_true", help="swap under compiled code")
    options = parser.parse_args(argv)
    for name in WORDS:
        train(name, options)

    model, tokenizer = base(options)
    *first, new = WORDS
    for name in first:
        fastpeft.load_adapter(model, options.out / name, adapter_name=name)
    fastpeft.prepare_model_for_compiled_hotswap(model, target_rank=max(RANKS.values()))
    files = {**dict(zip(first, first, strict=True)), NONE: NONE}
    wrong = rows_wrong(model.eval(), tokenizer, options, files)

    held = {name: id(parameter) for name, parameter in model.named_parameters()}
    swap(model, options.out / new, first[0], options.compile)
    assert held == {name: id(parameter) for name, parameter in model.named_parameters()}
    print(f"{new} in the place of {first[0]}, in the same parameters:")
    wrong += rows_wrong(model, tokenizer, options, {**files, first[0]: new})
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
