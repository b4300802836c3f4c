"""Visualization of a generation.

tokens       what a step changed, and the text of single tokens
display      the steps of a generation as coloured text and as a table
streamers    recording a generation, and drawing it live in the terminal
pictures     grids of images, and the path of an image over its steps
animation    the steps of generations as an animated SVG picture
page         the HTML page around runs that are shown step by step
trace        a generation as an HTML page with a slider, and as a plot
"""
