"""Which transformers Auto classes a model can be made with, and how the classes behind them are called. Pure data."""

from __future__ import annotations

from collections.abc import Mapping

# Auto class -> what stands behind the family's name ("Llama", "Bert") in the names of its classes, the usual one first.
ENDINGS: Mapping[str, tuple[str, ...]] = {
    "AutoModelForCausalLM": ("ForCausalLM", "LMHeadModel"),
    "AutoModelForSeq2SeqLM": ("ForConditionalGeneration", "MTModel", "ForSeq2SeqLM"),
    "AutoModelForMaskedLM": ("ForMaskedLM",),
    "AutoModelForSequenceClassification": ("ForSequenceClassification",),
    "AutoModelForTokenClassification": ("ForTokenClassification",),
    "AutoModelForQuestionAnswering": ("ForQuestionAnswering",),
    "AutoModelForMultipleChoice": ("ForMultipleChoice",),
    "AutoModelForImageClassification": ("ForImageClassification",),
    "AutoModelForObjectDetection": ("ForObjectDetection",),
    "AutoModelForSemanticSegmentation": ("ForSemanticSegmentation",),
    "AutoModelForDepthEstimation": ("ForDepthEstimation",),
    "AutoModelForAudioClassification": ("ForAudioClassification", "ForSequenceClassification"),
    "AutoModelForCTC": ("ForCTC",),
    "AutoModelForSpeechSeq2Seq": ("ForConditionalGeneration",),
    "AutoModel": ("Model",),
}


def auto_class_of(architecture: str) -> str | None:
    """The Auto class that a class belongs to; None for one that is not made here."""
    return next((name for name, endings in ENDINGS.items() if architecture.endswith(endings)), None)
