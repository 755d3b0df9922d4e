"""Random inputs for a model of each task, and the loss and logits that `fastpeft check` compares."""

from typing import NamedTuple

import torch
from torch import nn

from fastpeft.configs import TaskType

ROWS, LENGTH, POSITIONS = 4, 33, 4  # a draw's batch, and of how many last positions the logits are compared


class Batch(NamedTuple):
    """What the model is called with, and the targets of its logits: one tensor, for a question's answer two."""

    task: TaskType
    inputs: dict[str, torch.Tensor | bool]
    targets: tuple[torch.Tensor, ...]


def random_batch(
    model: nn.Module, task: TaskType, generator: torch.Generator, room: int = 0, padded: bool = False
) -> Batch:
    """One batch of random tokens with random targets. room: of how many more positions the model is to have; padded:
    with a mask, and a causal model's rows padded on the left, each more than the one before."""
    config = model.config
    embedding = model.get_input_embeddings().weight
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or LENGTH + 2
    length = max(1, min(LENGTH, longest - 2 - room))  # RoBERTa's and OPT's positions begin at 2

    def draw(limit: int, *shape: int) -> torch.Tensor:
        return torch.randint(limit, shape, generator=generator).to(embedding.device)

    ids = draw(len(embedding), ROWS, length)
    inputs: dict[str, torch.Tensor | bool] = {"input_ids": ids}
    if padded:
        inputs["attention_mask"] = torch.ones_like(ids)
    if task == TaskType.CAUSAL_LM and padded:
        started = (
            torch.arange(length, device=ids.device) >= torch.arange(ROWS, device=ids.device)[:, None] * length // 8
        )
        inputs["attention_mask"] = started.long()
        seen = started[:, :-1]  # where a token is to be foretold from a token
        return Batch(task, inputs, (ids[:, 1:].masked_fill(~seen, -100),))
    if task == TaskType.CAUSAL_LM:
        return Batch(task, {**inputs, "use_cache": False}, (ids[:, 1:],))
    if task == TaskType.SEQ_2_SEQ_LM:
        inputs.update(decoder_input_ids=draw(len(embedding), ROWS, length), use_cache=False)
        return Batch(task, inputs, (draw(len(embedding), ROWS, length),))
    if task == TaskType.QUESTION_ANS:
        return Batch(task, inputs, (draw(length, ROWS), draw(length, ROWS)))
    if task == TaskType.TOKEN_CLS:
        return Batch(task, inputs, (draw(config.num_labels, ROWS, length),))
    if getattr(config, "is_encoder_decoder", False):  # reads the sentence off at its only end token
        inputs["input_ids"] = torch.where(ids == config.eos_token_id, (ids + 1) % len(embedding), ids)
        inputs["input_ids"][:, -1] = config.eos_token_id
    return Batch(task, inputs, (draw(config.num_labels, ROWS),))


def logits_and_loss(batch: Batch, output) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits to compare, and the mean cross entropy in fp32 or wider: the models' own loss would narrow float64."""
    if batch.task == TaskType.QUESTION_ANS:
        both = (output.start_logits, output.end_logits)
        return torch.stack(both), sum(_loss(each, goal) for each, goal in zip(both, batch.targets, strict=True))
    logits = output.logits
    (targets,) = batch.targets
    if batch.task == TaskType.SEQ_CLS:
        return logits, _loss(logits, targets)
    scored = logits[:, :-1] if batch.task == TaskType.CAUSAL_LM else logits
    return logits[:, -POSITIONS:], _loss(scored.flatten(0, 1), targets.flatten())


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if wide.shape[-1] == 1:  # a regression
        return wide.square().mean()
    return nn.functional.cross_entropy(wide, targets)
