"""From a trial to a folder that stands alone: readable model code, its weights, and a card that says what it is.

The code is no template filled in: it is the search model's own source, specialised to the one model. `pick` says which
trial, `write` makes its folder. The text comes from `code`: `closure` copies what the model reaches (and which
`imports` may stay), `blocks` writes its layout into the `template`, `specialise` removes every option that has one
value, `kernels` and `vendor` give it Triton kernels. `card` describes it, and `parity` compares it with the search
model before anything is kept. `hf` does the same for transformers; `dialects` put the weights into model classes that
others have written.
"""

from archsearch.export.pick import pick as pick
from archsearch.export.write import export_model as export_model
from archsearch.export.write import export_run as export_run
