from .devices import ONE_DEVICE as ONE_DEVICE
from .devices import Devices as Devices
from .interruption import Interruption as Interruption
from .interruption import TrainingInterrupted as TrainingInterrupted
from .processes import DistributedError as DistributedError
from .processes import failing_together as failing_together
from .processes import start as start
