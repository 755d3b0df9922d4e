"""The learned rows of prompt tuning (Lester et al., arXiv 2104.08691) and P-tuning (Liu et al., arXiv 2103.10385,
section 3.2), under HF peft's names: a table, or a table behind a small network that is gone once training is over."""

import contextlib

import torch
from torch import Tensor, nn

from fastpeft.distributed import check_gathered, sharded_by_itself


def _learned(table: nn.Embedding) -> Tensor:
    """All rows. Who keeps them elsewhere (accelerate, or FSDP2 where the table is sharded by itself) brings them when
    the module is called."""
    if "_hf_hook" in table.__dict__:
        return table(torch.arange(table.num_embeddings))
    if sharded_by_itself(table):
        return table(torch.arange(table.num_embeddings, device=table.weight.device))
    check_gathered("a prompt", table.weight)
    return table.weight


def _lacks_lstm(rows: Tensor) -> bool:
    """Whether autocast would ask oneDNN for an LSTM that it does not have on this processor, where torch, and so HF
    peft, raises RuntimeError."""
    if not (rows.is_cpu and torch.is_autocast_enabled("cpu")):
        return False
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(torch.get_autocast_dtype("cpu"))
    has = getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", None)
    return has is not None and not has()


def over(other: nn.Module, used: int) -> "PromptTable | PromptNetwork":
    """One that computes with the children of another module, which have the same names."""
    kind = PromptNetwork if "mlp_head" in other._modules else PromptTable
    view = kind.__new__(kind)
    nn.Module.__init__(view)
    view.used = used
    view._modules.update(other._modules)
    return view


class PromptTable(nn.Module):
    """`length` rows of `width` numbers, trained as they are; the first `used` of them stand in front of the tokens."""

    projects = False  # whether the rows come out of a network
    left_behind = False  # whether the file it is from has a network, and this is the table alone
    parts: dict = {}  # no other stack has any
    most: int | None = None  # how many tokens a row of the model can have

    def __init__(self, length: int, width: int, used: int, device=None):
        super().__init__()
        self.used = used
        self.embedding = nn.Embedding(length, width, device=device)

    def rows(self) -> Tensor:
        """(used, width), for a call."""
        return _learned(self.embedding)[: self.used]

    def table(self) -> Tensor:
        """(length, width): what HF peft saves."""
        return _learned(self.embedding)


class PromptNetwork(nn.Module):
    """The same rows out of a table and, as HF peft has them, three linear layers ("MLP"), or a bidirectional LSTM of
    `layers` layers and two linear ones ("LSTM"). Drawn in this order."""

    projects = True
    left_behind = False
    parts: dict = {}
    most: int | None = None

    def __init__(self, length: int, width: int, used: int, kind: str, hidden: int, layers: int, dropout: float):
        super().__init__()
        self.used = used
        self.embedding = nn.Embedding(length, width)
        if kind == "LSTM":
            options = {"dropout": dropout, "bidirectional": True, "batch_first": True}
            self.lstm_head = nn.LSTM(width, hidden, layers, **options)
            inner = nn.Linear(2 * hidden, 2 * hidden)
            self.mlp_head = nn.Sequential(inner, nn.ReLU(), nn.Linear(2 * hidden, width))
        else:
            first, second = nn.Linear(width, hidden), nn.Linear(hidden, hidden)
            self.mlp_head = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(hidden, width))

    def rows(self) -> Tensor:
        """(used, width), for a call: computed once for the batch, with dropout in training."""
        return self._all()[: self.used]

    def _all(self) -> Tensor:
        rows = _learned(self.embedding)
        if "lstm_head" in self._modules:
            with torch.autocast(rows.device.type, enabled=False) if _lacks_lstm(rows) else contextlib.nullcontext():
                rows = self.lstm_head(rows)[0]
        return self.mlp_head(rows)

    @torch.enable_grad()  # as in HF peft: without, an LSTM is computed in another way and rounds otherwise
    def table(self) -> Tensor:
        """(length, width), without dropout: what HF peft saves."""
        training = self.training
        self.eval()
        try:
            return self._all().detach()
        finally:
            self.train(training)
