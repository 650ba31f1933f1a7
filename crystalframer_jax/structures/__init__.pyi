from .crystal import Crystal as Crystal
from .crystal import CrystalError as CrystalError
from .files import as_crystals as as_crystals
from .files import read_crystals as read_crystals
from .lattice import lattice_frames as lattice_frames
from .neighbors import LatticeBox as LatticeBox
from .neighbors import NeighborRows as NeighborRows
from .neighbors import neighbor_rows as neighbor_rows
