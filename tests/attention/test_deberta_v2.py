"""DeBERTa-v2 with a prefix, which HF peft refuses: beside the same scores written out, the prefix's in front."""

import math

import pytest
import torch

import fastpeft
from tests.models import batch

LENGTH, HEADS, DEPTH = 5, 4, 8


def model(**settings):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(
        "deberta-v2", vocab_size=97, hidden_size=HEADS * DEPTH, num_hidden_layers=2, num_attention_heads=HEADS,
        intermediate_size=48, max_position_embeddings=64, relative_attention=True, position_buckets=8,
        type_vocab_size=0, norm_rel_ebd="layer_norm", position_biased_input=False, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    made = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    return made


def written_out(self, table, layer, hidden_states, attention_mask, relative_pos, rel_embeddings):
    """The attention of one layer, with the prefix's scores in front of the others."""
    parts = (self.query_proj, self.key_proj, self.value_proj)
    query, key, value = (self.transpose_for_scores(part(hidden_states), HEADS) for part in parts)
    terms = 1 + len(self.pos_att_type)
    scores = query @ key.transpose(-1, -2) / math.sqrt(DEPTH * terms)
    scores = scores + self.disentangled_attention_bias(query, key, relative_pos, rel_embeddings, terms)
    scores = scores.unflatten(0, (-1, HEADS)).masked_fill(~attention_mask.bool(), -torch.inf)
    blocks = (table[:, block * HEADS * DEPTH :][:, : HEADS * DEPTH] for block in (2 * layer, 2 * layer + 1))
    virtual_key, virtual_value = (block.unflatten(1, (HEADS, DEPTH)).transpose(0, 1) for block in blocks)
    first = query.unflatten(0, (-1, HEADS)) @ virtual_key.transpose(-1, -2) / math.sqrt(DEPTH * terms)
    weights = torch.cat((first, scores), -1).softmax(-1)
    out = weights[..., :LENGTH] @ virtual_value + weights[..., LENGTH:] @ value.unflatten(0, (-1, HEADS))
    return out.transpose(1, 2).flatten(2), None


@pytest.mark.parametrize("types", [["c2p", "p2c"], ["c2p"]])
@pytest.mark.parametrize("share_att_key", [True, False])
def test_a_prefix_is_content_without_a_position(types, share_att_key, monkeypatch):
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

    settings, inputs = {"share_att_key": share_att_key, "pos_att_type": types}, batch("SEQ_CLS")
    config = fastpeft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=LENGTH)
    ours = fastpeft.patch(model(**settings), config).eval()
    found = ours(**inputs)
    found.loss.backward()
    table = ours.prompt_encoder["default"].embedding.weight
    copy = table.detach().clone().requires_grad_()
    plain = model(**settings).requires_grad_(False)
    layers = [module for module in plain.modules() if isinstance(module, DisentangledSelfAttention)]

    def forward(self, hidden_states, mask, _weights=False, relative_pos=None, rel_embeddings=None, **_):
        return written_out(self, copy, layers.index(self), hidden_states, mask, relative_pos, rel_embeddings)

    monkeypatch.setattr(DisentangledSelfAttention, "forward", forward)
    expected = plain(**inputs)
    expected.loss.backward()
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)
    assert (table.grad - copy.grad).norm() <= 1e-5 * copy.grad.norm()
    assert copy.grad.norm() > 0


def test_without_its_prefix_it_is_the_base():
    settings, inputs = {"share_att_key": True, "pos_att_type": ["c2p", "p2c"]}, batch("SEQ_CLS")
    config = fastpeft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=LENGTH)
    ours = fastpeft.patch(model(**settings), config).eval()
    with torch.no_grad(), fastpeft.disable_adapter(ours):
        assert torch.equal(ours(**inputs).logits, model(**settings)(**inputs).logits)
    with pytest.raises(fastpeft.PatchError, match="output_attentions"):
        ours(**inputs, output_attentions=True)
