"""Twenty steps of AdamW: the losses are those of HF peft, for each method, on a decoder, an encoder and both."""

import warnings

import pytest
import torch

from tests.matrix import Cell, Library, ours, peft_s

STEPS = 20
CELLS = [
    *(Cell("llama", "CAUSAL_LM", method) for method in ("lora", "adalora", "prefix", "p-tuning", "prompt", "adapter")),
    *(Cell("gpt2", "CAUSAL_LM", method) for method in ("lora", "adapter")),
    *(Cell("bert", "SEQ_CLS", method) for method in ("lora", "adalora", "prefix", "p-tuning", "prompt")),
    *(Cell("bert", "QUESTION_ANS", method) for method in ("lora", "prefix", "prompt")),
    *(Cell("llama", "TOKEN_CLS", method) for method in ("lora", "adalora", "prefix")),
    *(Cell("t5", "SEQ_2_SEQ_LM", method) for method in ("lora", "adalora", "prefix", "p-tuning", "prompt")),
    *(Cell("bart", "SEQ_2_SEQ_LM", method) for method in ("lora", "prefix", "prompt")),
]


def losses(library: Library, cell: Cell) -> torch.Tensor:
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.wrap(cell.base(), cell).eval()  # without dropout, which the two draw in other ways
    trained = [parameter for _, parameter in sorted(model.named_parameters()) if parameter.requires_grad]
    optimiser, found = torch.optim.AdamW(trained, lr=1e-3), []
    for step in range(1, STEPS + 1):
        optimiser.zero_grad()
        loss = model(**cell.inputs()).loss
        loss.backward()
        found.append(loss.detach())
        optimiser.step()
        library.stepped(model, step)
    return torch.stack(found)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_losses_of_twenty_steps(cell):
    found, expected = losses(ours(hf_quirks=True), cell), losses(peft_s(), cell)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert found[-1] < found[0]
