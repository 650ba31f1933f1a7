from .metrics import main_metrics as main_metrics
from .metrics import mean_predictor_errors as mean_predictor_errors
from .metrics import target_metrics as target_metrics
from .plots import learning_curve as learning_curve
from .plots import parity as parity
from .plots import roc as roc
from .predictions import write_predictions as write_predictions
