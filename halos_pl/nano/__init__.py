"""The nano world: a small language of stories whose every sentence a program understands.

A model of 0.4 million parameters learns it in two minutes, and whether a story is what was asked for needs no judge. It
is this library's example and its laboratory; no outside data is in it.
"""

from halos_pl.nano.wishes import granted

__all__ = ["granted"]
