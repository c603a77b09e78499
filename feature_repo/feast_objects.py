"""Read by the `feast` command only, which looks for objects in modules: the definitions of the workspace that FASTQ_WORKSPACE names."""

import os

from fastq.platform import load_platform
from feature_repo.definitions import definitions

_found = definitions(load_platform(os.environ["FASTQ_WORKSPACE"]))
player, player_rows, player_state = _found.player, _found.player_rows, _found.player_state
