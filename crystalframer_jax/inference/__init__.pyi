from .calculator import energy_calculator as energy_calculator
from .ensemble import Ensemble as Ensemble
from .ensemble import load_model as load_model
from .evaluation import Predictions as Predictions
from .frames import compute_frames as compute_frames
from .predictor import Predictor as Predictor
