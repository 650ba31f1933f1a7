from .metrics import mean_absolute_errors as mean_absolute_errors
from .metrics import mean_predictor_errors as mean_predictor_errors
from .metrics import regression_metrics as regression_metrics
from .plots import learning_curve as learning_curve
from .plots import parity as parity
from .predictions import write_predictions as write_predictions
