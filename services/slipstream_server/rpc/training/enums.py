"""Names of the training room and their numbers in the contract. Tables only."""

from __future__ import annotations

from slipstream.training.v1 import dataset_service_pb2 as dataset_pb2
from slipstream.training.v1 import training_service_pb2 as pb2
from slipstream.type.v1 import precision_pb2
from slipstream_server.training.rows import RowFormat
from slipstream_server.training.states import DatasetState, JobState

JOB_STATES = {
    JobState.VALIDATING: pb2.TrainingJob.STATE_VALIDATING,
    JobState.QUEUED: pb2.TrainingJob.STATE_QUEUED,
    JobState.STARTING: pb2.TrainingJob.STATE_STARTING,
    JobState.RUNNING: pb2.TrainingJob.STATE_RUNNING,
    JobState.PAUSED: pb2.TrainingJob.STATE_PAUSED,
    JobState.EVALUATING: pb2.TrainingJob.STATE_EVALUATING,
    JobState.PUBLISHING: pb2.TrainingJob.STATE_PUBLISHING,
    JobState.SUCCEEDED: pb2.TrainingJob.STATE_SUCCEEDED,
    JobState.FAILED: pb2.TrainingJob.STATE_FAILED,
    JobState.CANCELLED: pb2.TrainingJob.STATE_CANCELLED,
}
DATASET_STATES = {
    DatasetState.VALIDATING: dataset_pb2.Dataset.STATE_VALIDATING,
    DatasetState.READY: dataset_pb2.Dataset.STATE_READY,
    DatasetState.INVALID: dataset_pb2.Dataset.STATE_INVALID,
    DatasetState.FAILED: dataset_pb2.Dataset.STATE_FAILED,
}
FORMATS = {
    RowFormat.MESSAGES: dataset_pb2.DATASET_FORMAT_MESSAGES,
    RowFormat.PROMPT_COMPLETION: dataset_pb2.DATASET_FORMAT_PROMPT_COMPLETION,
}
DATA_TYPES = {
    "float32": precision_pb2.DATA_TYPE_FLOAT32,
    "bfloat16": precision_pb2.DATA_TYPE_BFLOAT16,
}
LOG_LEVELS = {"INFO": pb2.LOG_LEVEL_INFO, "WARNING": pb2.LOG_LEVEL_WARNING}
