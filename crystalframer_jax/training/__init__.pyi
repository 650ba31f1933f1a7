from .errors import TrainingError as TrainingError
from .logging import read_metrics as read_metrics
from .loop import Options as Options
from .loop import Run as Run
from .start import train as train
from .state import TrainState as TrainState
