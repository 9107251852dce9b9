"""Parameters of encoder-decoder families, text and speech; see ``parameters``."""

from __future__ import annotations

from collections.abc import Mapping

from slipstream_server.models.parameters import Counting, Shape, Tally, Unsaid


def _t5(shape: Shape) -> Tally:
    model, width, heads = Tally(), shape.size("d_model"), shape.size("num_heads")
    encoder_layers = shape.size("num_layers")
    decoder_layers = shape.size("num_decoder_layers", default=encoder_layers)
    attention, feed = Tally(), Tally()
    attention.linear(width, heads * shape.size("d_kv"), times=4)
    attention.other(width)
    is_gated = str(shape.config.get("feed_forward_proj", "relu")).startswith("gated")
    feed.linear(width, shape.size("d_ff"), times=3 if is_gated else 2)
    feed.other(width)
    if shape.ends_with("EncoderModel"):
        decoder_layers = 0
    model.add(attention, times=encoder_layers + 2 * decoder_layers)
    model.add(feed, times=encoder_layers + decoder_layers)
    stacks = 2 if decoder_layers else 1
    model.other(shape.size("relative_attention_num_buckets", default=32) * heads + width, times=stacks)
    model.other(shape.size("vocab_size") * width)
    if shape.ends_with("ForConditionalGeneration") and not shape.flag("tie_word_embeddings", True):
        model.other(shape.size("vocab_size") * width)
    elif not shape.ends_with("ForConditionalGeneration", "Model"):
        raise Unsaid("architectures")
    return model


def _attention(width: int, *, key_bias: bool = True) -> Tally:
    """Four projections and the norm beside them."""
    part = Tally()
    part.linear(width, width, bias=True, times=3)
    part.linear(width, width, bias=key_bias)
    part.other(2 * width)
    return part


def _feed_forward(width: int, inner: int) -> Tally:
    part = Tally()
    part.linear(width, inner, bias=True)
    part.linear(inner, width, bias=True)
    part.other(2 * width)
    return part


def _stacks(shape: Shape, *, key_bias: bool = True) -> Tally:
    """The layers of encoder and decoder; a decoder layer attends twice."""
    width, stacks = shape.size("d_model"), Tally()
    encoder_layers, decoder_layers = shape.size("encoder_layers"), shape.size("decoder_layers")
    stacks.add(_attention(width, key_bias=key_bias), times=encoder_layers + 2 * decoder_layers)
    stacks.add(_feed_forward(width, shape.size("encoder_ffn_dim")), times=encoder_layers)
    stacks.add(_feed_forward(width, shape.size("decoder_ffn_dim")), times=decoder_layers)
    return stacks


def _bart_like(
    *, extra_positions: int, has_input_norm: bool, has_final_norm: bool, shares_tables: bool = False
) -> Counting:
    def count(shape: Shape) -> Tally:
        if not shape.ends_with("ForConditionalGeneration", "MTModel", "Model"):
            raise Unsaid("architectures")
        if not shape.flag("tie_word_embeddings", True) or not shape.flag("share_encoder_decoder_embeddings", True):
            raise Unsaid("tie_word_embeddings")
        model, width = _stacks(shape), shape.size("d_model")
        model.other(shape.size("vocab_size") * width)
        model.other((shape.size("max_position_embeddings") + extra_positions) * width, times=2)
        model.other(2 * width, times=2 * (has_input_norm + has_final_norm))
        return model

    return count


def _whisper(shape: Shape) -> Tally:
    if not shape.ends_with("ForConditionalGeneration", "Model"):
        raise Unsaid("architectures")
    model, width = _stacks(shape, key_bias=False), shape.size("d_model")
    model.other(3 * shape.size("num_mel_bins") * width + width, 3 * width * width + width)
    model.other((shape.size("max_source_positions") + shape.size("max_target_positions")) * width)
    model.other(2 * width, times=2)
    model.other(shape.size("vocab_size") * width)
    return model


SEQUENCE_TO_SEQUENCE: Mapping[str, Counting] = {
    "t5": _t5,
    "mt5": _t5,
    "bart": _bart_like(extra_positions=2, has_input_norm=True, has_final_norm=False),
    "mbart": _bart_like(extra_positions=2, has_input_norm=True, has_final_norm=True),
    "pegasus": _bart_like(extra_positions=0, has_input_norm=False, has_final_norm=True),
    "marian": _bart_like(extra_positions=0, has_input_norm=False, has_final_norm=False),
    "whisper": _whisper,
}
