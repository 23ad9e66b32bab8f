import sys
from pathlib import Path

# bench/ is no package; its files import harness from here, as they do when run as scripts.
sys.path.insert(0, str(Path(__file__).parent))
