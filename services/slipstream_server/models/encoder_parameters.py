"""Parameters of encoder families, text and pictures; see ``parameters``."""

from __future__ import annotations

from collections.abc import Mapping

from slipstream_server.models.parameters import Counting, Shape, Tally, Unsaid

_POOLED_BERT = ("BertModel", "ForSequenceClassification", "ForNextSentencePrediction")


def transformer_layer(hidden: int, inner: int, *, qkv_bias: bool = True) -> Tally:
    """Attention, a plain feed-forward and two norms, all with biases: a layer of BERT, and of most encoders since."""
    layer = Tally()
    layer.linear(hidden, hidden, bias=qkv_bias, times=3)
    layer.linear(hidden, hidden, bias=True)
    layer.linear(hidden, inner, bias=True)
    layer.linear(inner, hidden, bias=True)
    layer.other(2 * hidden, times=2)
    return layer


def _layers(shape: Shape, hidden: int) -> Tally:
    layers = Tally()
    layers.add(transformer_layer(hidden, shape.size("intermediate_size")), times=shape.size("num_hidden_layers"))
    return layers


def _add_label_head(model: Tally, shape: Shape, hidden: int, *, has_dense: bool) -> bool:
    """The head that names labels or spans; False where the architecture has none of these."""
    if shape.ends_with("ForSequenceClassification"):
        if has_dense:
            model.linear(hidden, hidden, bias=True)
        model.linear(hidden, shape.num_labels, bias=True)
    elif shape.ends_with("ForTokenClassification") or shape.ends_with("ForQuestionAnswering"):
        model.linear(hidden, shape.num_labels, bias=True)
    else:
        return False
    return True


def _add_masked_head(model: Tally, shape: Shape, hidden: int, width: int | None = None) -> None:
    """A transform, its norm, and the bias of the output, whose table is the token table."""
    width = width or hidden
    if not shape.flag("tie_word_embeddings", True):
        raise Unsaid("tie_word_embeddings")
    model.linear(hidden, width, bias=True)
    model.other(2 * width, shape.size("vocab_size"))


def _bert(shape: Shape) -> Tally:
    model, hidden = Tally(), shape.size("hidden_size")
    rows = shape.size("vocab_size") + shape.size("max_position_embeddings") + shape.size("type_vocab_size", default=2)
    model.other(rows * hidden, 2 * hidden)
    model.add(_layers(shape, hidden))
    if shape.ends_with(*_POOLED_BERT):
        model.linear(hidden, hidden, bias=True)
    if shape.ends_with("ForMaskedLM"):
        _add_masked_head(model, shape, hidden)
    elif not _add_label_head(model, shape, hidden, has_dense=False) and not shape.ends_with("Model"):
        raise Unsaid("architectures")
    return model


def _roberta(shape: Shape) -> Tally:
    model, hidden = Tally(), shape.size("hidden_size")
    rows = shape.size("vocab_size") + shape.size("max_position_embeddings") + shape.size("type_vocab_size", default=2)
    model.other(rows * hidden, 2 * hidden)
    model.add(_layers(shape, hidden))
    if shape.ends_with("ForMaskedLM"):
        _add_masked_head(model, shape, hidden)
    elif not _add_label_head(model, shape, hidden, has_dense=True):
        if not shape.ends_with("Model"):
            raise Unsaid("architectures")
        model.linear(hidden, hidden, bias=True)
    return model


def _mpnet(shape: Shape) -> Tally:
    model, hidden = Tally(), shape.size("hidden_size")
    rows = shape.size("vocab_size") + shape.size("max_position_embeddings")
    model.other(rows * hidden, 2 * hidden)
    model.other(shape.size("relative_attention_num_buckets", default=32) * shape.size("num_attention_heads"))
    model.add(_layers(shape, hidden))
    if shape.ends_with("ForMaskedLM"):
        _add_masked_head(model, shape, hidden)
    elif not _add_label_head(model, shape, hidden, has_dense=True):
        if not shape.ends_with("Model"):
            raise Unsaid("architectures")
        model.linear(hidden, hidden, bias=True)
    return model


def _distilbert(shape: Shape) -> Tally:
    model, hidden = Tally(), shape.size("dim", "hidden_size")
    model.other((shape.size("vocab_size") + shape.size("max_position_embeddings")) * hidden, 2 * hidden)
    layer = transformer_layer(hidden, shape.size("hidden_dim", "intermediate_size"))
    model.add(layer, times=shape.size("n_layers", "num_hidden_layers"))
    if shape.ends_with("ForMaskedLM"):
        _add_masked_head(model, shape, hidden)
    elif not _add_label_head(model, shape, hidden, has_dense=True) and not shape.ends_with("Model"):
        raise Unsaid("architectures")
    return model


def _electra(shape: Shape) -> Tally:
    model, hidden, width = Tally(), shape.size("hidden_size"), shape.size("embedding_size")
    rows = shape.size("vocab_size") + shape.size("max_position_embeddings") + shape.size("type_vocab_size", default=2)
    model.other(rows * width, 2 * width)
    if width != hidden:
        model.linear(width, hidden, bias=True)
    model.add(_layers(shape, hidden))
    if shape.ends_with("ForMaskedLM"):
        _add_masked_head(model, shape, hidden, width)
    elif shape.ends_with("ForPreTraining"):
        model.linear(hidden, hidden, bias=True)
        model.linear(hidden, 1, bias=True)
    elif not _add_label_head(model, shape, hidden, has_dense=True) and not shape.ends_with("Model"):
        raise Unsaid("architectures")
    return model


def _albert(shape: Shape) -> Tally:
    """All layers of a group share their weights."""
    model, hidden, width = Tally(), shape.size("hidden_size"), shape.size("embedding_size")
    rows = shape.size("vocab_size") + shape.size("max_position_embeddings") + shape.size("type_vocab_size", default=2)
    model.other(rows * width, 2 * width)
    model.linear(width, hidden, bias=True)
    shared = shape.size("num_hidden_groups", default=1) * shape.size("inner_group_num", default=1)
    model.add(transformer_layer(hidden, shape.size("intermediate_size")), times=shared)
    if shape.ends_with("AlbertModel", "ForSequenceClassification"):
        model.linear(hidden, hidden, bias=True)
    if shape.ends_with("ForMaskedLM"):
        _add_masked_head(model, shape, hidden, width)
    elif not _add_label_head(model, shape, hidden, has_dense=False) and not shape.ends_with("Model"):
        raise Unsaid("architectures")
    return model


def _deberta_v2(shape: Shape) -> Tally:
    if shape.size("conv_kernel_size", default=0) or not shape.flag("relative_attention", False):
        raise Unsaid("relative_attention")
    if not shape.flag("share_att_key", False) or shape.config.get("embedding_size") not in (
        None,
        shape.size("hidden_size"),
    ):
        raise Unsaid("share_att_key")
    model, hidden = Tally(), shape.size("hidden_size")
    positions = shape.size("max_position_embeddings") if shape.flag("position_biased_input", True) else 0
    rows = shape.size("vocab_size") + positions + shape.size("type_vocab_size", default=0)
    model.other(rows * hidden, 2 * hidden)
    buckets = shape.size("position_buckets")
    model.other(2 * buckets * hidden)
    if "layer_norm" in str(shape.config.get("norm_rel_ebd", "none")):
        model.other(2 * hidden)
    model.add(_layers(shape, hidden))
    if not _add_label_head(model, shape, hidden, has_dense=True) and not shape.ends_with("Model"):
        raise Unsaid("architectures")
    return model


def _vit(shape: Shape) -> Tally:
    model, hidden, patch = Tally(), shape.size("hidden_size"), shape.size("patch_size")
    num_patches = (shape.size("image_size") // max(patch, 1)) ** 2
    model.other(shape.size("num_channels", default=3) * patch**2 * hidden + hidden)
    model.other((num_patches + 2) * hidden, 2 * hidden)
    layer = transformer_layer(hidden, shape.size("intermediate_size"), qkv_bias=shape.flag("qkv_bias", True))
    model.add(layer, times=shape.size("num_hidden_layers"))
    if shape.ends_with("ForImageClassification"):
        model.linear(hidden, shape.num_labels, bias=True)
    elif shape.ends_with("Model"):
        model.linear(hidden, shape.size("pooler_output_size", default=hidden), bias=True)
    else:
        raise Unsaid("architectures")
    return model


ENCODERS: Mapping[str, Counting] = {
    "bert": _bert,
    "roberta": _roberta,
    "xlm-roberta": _roberta,
    "camembert": _roberta,
    "mpnet": _mpnet,
    "distilbert": _distilbert,
    "electra": _electra,
    "albert": _albert,
    "deberta-v2": _deberta_v2,
    "vit": _vit,
}
