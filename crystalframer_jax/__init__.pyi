from .inference import Ensemble as Ensemble
from .inference import Predictor as Predictor
from .inference import compute_frames as compute_frames
from .official import load_official as load_official

__version__: str
