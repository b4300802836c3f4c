"""Generation made visible.

display      a generation in the terminal
streamers    a generation recorded, and drawn live
trace        a generation as an HTML page with a slider, and as a plot
"""

import transformers  # noqa: F401  registers the model types before any module here is loaded
