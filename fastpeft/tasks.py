"""What a task adds to a patched model: the heads that it trains, and what virtual tokens in front of its input do to
its targets. The classes stand in front of the model's own class; third parties add theirs to the table."""

from fastpeft.calls import Room, widened
from fastpeft.config_base import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, TaskType
from fastpeft.model import PatchedModel

IGNORED = -100  # the label that a loss leaves out


class PatchedModelForCausalLM(PatchedModel):
    """Language modelling: a label for each token, the last virtual token predicts the first."""

    @classmethod
    def move_targets(cls, given: dict, room: Room, spares: bool) -> None:
        labels = given.get("labels")
        if spares:  # no logits of virtual tokens are computed, but of the last where there is something to predict
            given["logits_to_keep"] = room.tokens + (labels is not None)
            room = Room(1, room.tokens)
        elif given.get("logits_to_keep") is not None:  # the labels are those of the logits that are kept
            return
        for name in ("labels", "shift_labels"):
            if (wanted := given.get(name)) is not None:
                given[name] = widened(wanted, room, IGNORED, name)

    @classmethod
    def move_targets_as_peft(cls, given: dict, room: Room) -> None:
        cls.move_targets(given, room, False)
        given.pop("token_type_ids", None)


class PatchedModelForSeq2SeqLM(PatchedModel):
    """Sequence to sequence: virtual tokens stand before the encoder's input, the labels are the decoder's."""

    @classmethod
    def decodes_its_input(cls, given: dict) -> bool:
        return given.get("labels") is None and super().decodes_its_input(given)


class PatchedModelForSequenceClassification(PatchedModel):
    """One class for a sequence."""

    heads = ("classifier", "score")


class PatchedModelForTokenClassification(PatchedModel):
    """A class for each token."""

    heads = ("classifier", "score")

    @classmethod
    def move_targets(cls, given: dict, room: Room, spares: bool) -> None:
        if (labels := given.get("labels")) is not None:
            given["labels"] = widened(labels, room, IGNORED, "labels")

    @classmethod
    def move_targets_as_peft(cls, given: dict, room: Room) -> None:
        """HF peft itself raises if there are labels."""
        super().move_targets_as_peft(given, room)
        cls.move_targets(given, room, False)


class PatchedModelForQuestionAnswering(PatchedModel):
    """The first and the last token of an answer, which virtual tokens move."""

    heads = ("qa_outputs",)
    peft_drops = ("token_type_ids", "position_ids")

    @classmethod
    def move_targets(cls, given: dict, room: Room, spares: bool) -> None:
        for name in ("start_positions", "end_positions"):
            if (places := given.get(name)) is not None:
                given[name] = places.clamp(min=0) + room.count


class PatchedModelForFeatureExtraction(PatchedModel):
    """Hidden states, without a head."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING.update(
    {
        TaskType.SEQ_CLS: PatchedModelForSequenceClassification,
        TaskType.SEQ_2_SEQ_LM: PatchedModelForSeq2SeqLM,
        TaskType.CAUSAL_LM: PatchedModelForCausalLM,
        TaskType.TOKEN_CLS: PatchedModelForTokenClassification,
        TaskType.QUESTION_ANS: PatchedModelForQuestionAnswering,
        TaskType.FEATURE_EXTRACTION: PatchedModelForFeatureExtraction,
    }
)
