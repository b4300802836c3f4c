"""Visualization of a generation.

display      the steps of a generation as coloured text and as a table
streamers    recording a generation, and drawing it live in the terminal
pictures     grids of images, and the path of an image over its steps
trace        a generation as an HTML page with a slider, and as a plot
"""

import transformers  # noqa: F401  registers the model types before any module here is loaded
