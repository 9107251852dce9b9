"""Datasets and previews as protobuf. Pure functions."""

from __future__ import annotations

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct

from slipstream.training.v1 import dataset_service_pb2 as pb2
from slipstream_server.resource_names import DatasetName
from slipstream_server.rpc.training.convert import problem_status, timestamp
from slipstream_server.rpc.training.enums import DATASET_STATES, FORMATS
from slipstream_server.training.preview import Preview, PreviewRow
from slipstream_server.training.resources import Dataset, DatasetReport, LocatedError
from slipstream_server.training.rows import RowFormat

# The fields of each format's rows, in the order of the contract.
_FIELD_NAMES = {"messages": ("messages",), "prompt_completion": ("prompt", "completion")}


def dataset_message(dataset: Dataset, *, with_row_errors: bool = True) -> pb2.Dataset:
    message = pb2.Dataset(
        name=str(DatasetName(dataset.id)),
        display_name=dataset.display_name,
        state=DATASET_STATES[dataset.state],
        format=_format_number(dataset.wanted_format),
        size_bytes=dataset.size_bytes,
        digest=f"sha256:{dataset.digest}",
        source=dataset.source,
        labels=dataset.labels,
        owner=dataset.owner,
        create_time=timestamp(dataset.create_time),
        update_time=timestamp(dataset.update_time),
        etag=dataset.etag,
    )
    if dataset.problem is not None:
        message.error.CopyFrom(problem_status(dataset.problem))
    if dataset.report is not None:
        fill_report(message, dataset.report, with_row_errors=with_row_errors)
    return message


def fill_report(message: pb2.Dataset, report: DatasetReport, *, with_row_errors: bool = True) -> None:
    """Put what reading the rows found into ``message``."""
    message.format = _format_number(report.row_format)
    message.field_names.extend(_FIELD_NAMES.get(report.row_format, ()))
    message.row_count, message.invalid_row_count = report.num_rows, report.num_invalid_rows
    for split in report.splits:
        message.splits.add(name=split.name, row_count=split.num_rows, invalid_row_count=split.num_invalid_rows)
    if with_row_errors:
        message.row_errors.extend(row_error_message(error) for error in report.errors)
    for reason, count in report.error_counts.items():
        message.error_counts.add(reason=_reason_number(reason), count=count)
    if not report.is_valid:
        count = sum(report.error_counts.values())
        message.state_message = (
            f"{count} row errors; {report.num_invalid_rows} of {report.num_rows} rows are not usable"
        )


def row_error_message(error: LocatedError) -> pb2.RowError:
    return pb2.RowError(
        split=error.split,
        path=error.path,
        line_number=error.line,
        field=error.field,
        reason=_reason_number(error.reason),
        message=error.message,
    )


def preview_message(preview: Preview, *, num_rows: int, has_tokens: bool) -> pb2.PreviewDatasetResponse:
    message = pb2.PreviewDatasetResponse(rows=[_row_message(row) for row in preview.rows], row_count=num_rows)
    if has_tokens and (lengths := sorted(preview.lengths)):
        message.token_statistics.CopyFrom(
            pb2.TokenStatistics(
                row_count=len(lengths),
                min_tokens=lengths[0],
                median_tokens=lengths[(len(lengths) - 1) // 2],
                p95_tokens=lengths[-(-95 * len(lengths) // 100) - 1],
                max_tokens=lengths[-1],
                truncated_row_count=preview.num_truncated,
            )
        )
    return message


def _row_message(row: PreviewRow) -> pb2.PreviewRow:
    fields = Struct()
    json_format.ParseDict(row.fields, fields)
    return pb2.PreviewRow(
        row_index=row.row_index,
        fields=fields,
        rendered_text="".join(token.text for token in row.tokens),
        tokens=[pb2.PreviewToken(token_id=t.token_id, text=t.text, in_loss=t.in_loss) for t in row.tokens],
        truncated=row.is_truncated,
        errors=[row_error_message(error) for error in row.errors],
        line_number=row.line,
    )


def _format_number(name: str) -> pb2.DatasetFormat.ValueType:
    return FORMATS[RowFormat(name)] if name else pb2.DATASET_FORMAT_UNSPECIFIED


def _reason_number(name: str) -> pb2.RowErrorReason.ValueType:
    return pb2.RowErrorReason.Value(f"ROW_ERROR_REASON_{name}")
