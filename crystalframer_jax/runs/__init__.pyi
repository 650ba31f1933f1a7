from .checkpoints import CheckpointError as CheckpointError
from .checkpoints import Checkpoints as Checkpoints
from .run_directory import read_config as read_config
