"""The code of many models becomes that of one: options with a single value, and what only others reach, go.

The files in the order in which a module's text passes through them (`specialiser.py` calls them, round after round):

    program      the functions and classes of the text by name
    values       what an expression can be, as far as the text tells
    evaluate     ... of one expression; `calls` of a call, `interpret` of a function, `analysis` of the whole text
    facts        what the rules are told of it
    rewrite      the edits of one round, from these rules:
    branches     tests with one outcome
    unused       constants, attributes, locals and code that nobody needs any more
    signatures   parameters and results that nobody needs any more
    inline       what has become smaller than a person would write

and once, when nothing changes any more:

    docs         docstrings without the options that went
    merge        functions with one user that they end become part of it
    tidy         imports, blank lines, line lengths

Texts and trees are those of `export.source`: edits replace stretches of text, so comments and layout stay.
"""

from archsearch.export.specialise.specialiser import specialised as specialised
from archsearch.export.specialise.tidy import tidy as tidy
