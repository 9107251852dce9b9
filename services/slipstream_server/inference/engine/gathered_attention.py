"""Attention from KV blocks in plain torch, for devices without Triton: what gpu_attention does, on gathered copies.

Decoding rows are gathered into one rectangle and attend at once, prompts one after the other. Same functions, same
blocks. Engine thread. Shapes: as in gpu_attention; R decoding rows, C keys of the longest.
"""

from __future__ import annotations

import torch

from slipstream_server.inference.engine.gpu_tables import StepTables
from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS
from slipstream_server.inference.engine.paged_attention import AttentionRule

# It gathers as much as the longest context of a step has.
IS_RECORDABLE = False


def write(
    keys_KND: torch.Tensor,
    values_KND: torch.Tensor,
    tables: StepTables,
    keys_BKLD: torch.Tensor,
    values_BKLD: torch.Tensor,
) -> None:
    """Put the keys and values of the step's tokens into their blocks."""
    positions_N = tables.positions_N.long()
    blocks_N = tables.tables_SB[tables.rows_N.long(), positions_N // BLOCK_TOKENS].long()
    places_N = positions_N % BLOCK_TOKENS
    keys_BKLD[blocks_N, :, places_N] = keys_KND.transpose(0, 1)
    values_BKLD[blocks_N, :, places_N] = values_KND.transpose(0, 1)


def attend(
    queries_HND: torch.Tensor,
    tables: StepTables,
    keys_BKLD: torch.Tensor,
    values_BKLD: torch.Tensor,
    rule: AttentionRule,
) -> torch.Tensor:
    """Each token attends to its own sequence up to itself, ``[N, H, D]``; see KVMemory.attend."""
    parts = []
    if num_decoding := tables.num_decoding:
        rows_R = tables.rows_N[:num_decoding].long()
        table_RB = tables.tables_SB[rows_R, : -(-tables.most_tokens // BLOCK_TOKENS)]
        ends_R = tables.positions_N[:num_decoding, None] + 1
        queries_RHND = queries_HND[:, :num_decoding].transpose(0, 1)[:, :, None]
        found = _attention(queries_RHND, table_RB, ends_R, keys_BKLD, values_BKLD, rule)
        parts.append(found[:, :, 0])
    for row, start, end, num_keys in tables.prompt_spans:
        table_1B = tables.tables_SB[row : row + 1, : -(-num_keys // BLOCK_TOKENS)]
        ends_1N = tables.positions_N[None, start:end] + 1
        found = _attention(queries_HND[None, :, start:end], table_1B, ends_1N, keys_BKLD, values_BKLD, rule)
        parts.append(found[0].transpose(0, 1))
    return torch.cat(parts)


def num_splits(num_tiles: int, num_heads: int, most_tokens: int, device: torch.device) -> int:
    """Nothing is split."""
    return 1


def tile_tokens(group: int) -> int:
    """Prompts go by spans."""
    return 1 << 30


def _attention(
    queries_RHND: torch.Tensor,
    table_RB: torch.Tensor,
    ends_RN: torch.Tensor,
    keys_BKLD: torch.Tensor,
    values_BKLD: torch.Tensor,
    rule: AttentionRule,
) -> torch.Tensor:
    """Outputs ``[R, H, N, D]`` of rows with equally many queries, which see the keys before ``ends_RN``."""
    keys_RKCD, values_RKCD = _gathered(keys_BKLD, table_RB), _gathered(values_BKLD, table_RB)
    place_C = torch.arange(keys_RKCD.shape[2], device=ends_RN.device)
    allowed_RNC = place_C < ends_RN[..., None]
    # Behind a sequence's end may be anything, NaN included.
    is_key_R1C1 = allowed_RNC.any(dim=1)[:, None, :, None]
    keys_RKCD, values_RKCD = (states.where(is_key_R1C1, 0) for states in (keys_RKCD, values_RKCD))
    if rule.window:
        allowed_RNC = allowed_RNC & (place_C >= ends_RN[..., None] - rule.window)
    if not rule.softcap:
        return torch.nn.functional.scaled_dot_product_attention(
            queries_RHND, keys_RKCD, values_RKCD, allowed_RNC[:, None], scale=rule.scale, enable_gqa=True
        )
    group = queries_RHND.shape[1] // keys_RKCD.shape[1]
    keys_RHCD, values_RHCD = (states.repeat_interleave(group, dim=1) for states in (keys_RKCD, values_RKCD))
    scores_RHNC = queries_RHND @ keys_RHCD.transpose(2, 3) * (rule.scale / rule.softcap)
    scores_RHNC = rule.softcap * torch.tanh(scores_RHNC)
    scores_RHNC = scores_RHNC.masked_fill(~allowed_RNC[:, None], -torch.inf)
    sums = torch.promote_types(queries_RHND.dtype, torch.float32)
    return scores_RHNC.to(sums).softmax(dim=-1).to(values_RHCD.dtype) @ values_RHCD


def _gathered(states_BKLD: torch.Tensor, table_RB: torch.Tensor) -> torch.Tensor:
    return states_BKLD[table_RB.long()].transpose(1, 2).flatten(2, 3)
