"""From a trial to a folder that stands alone: readable model code, its weights, and a card that says what it is.

The code is no template filled in: it is the search model's own source, specialised to the one model. `closure` copies
what the model reaches, `blocks` writes its layout, `fold` (with `analysis`, `flow`, `names`, `inline`) removes every
option that has one value, `docs`, `merge` and `tidy` polish, `kernels` and `vendor` give it Triton kernels, and
`parity` compares the result with the search model before anything is kept.
"""

from archsearch.export.pick import pick as pick
from archsearch.export.write import export_model as export_model
from archsearch.export.write import export_run as export_run
