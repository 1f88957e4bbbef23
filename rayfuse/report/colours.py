"""The colours of models, the same in every plot and page."""

OWN_COLOURS = {
    "fused": "#D55E00",
    "clm": "#0072B2",
    "target": "#8C8C8C",
    "ensemble": "#3F3F3F",
    "merged": "#B3B3B3",
}
OWN_HATCHES = {"ensemble": "//", "merged": "xx"}
SOURCE_COLOURS = ("#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#B8A600", "#5D3A9B", "#882255")
"""Mostly of Okabe and Ito, safe for colour-blind readers; beyond seven they repeat with hatches."""
