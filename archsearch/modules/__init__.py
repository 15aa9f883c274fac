"""The torch code of every mixer and FFN, and of the blocks between them.

Imports torch and archsearch_kernels and nothing else of archsearch, because the exporter copies these classes as
they stand. Conventions the rest relies on: matrices keep their input features on the last axis ([..., out, in]);
what is not a Linear, an Embedding or a norm is initialised by its module's own `reset_parameters`.
"""
