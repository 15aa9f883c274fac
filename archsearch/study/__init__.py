"""A study: ask for candidates, refuse what cannot be, run the rest, keep every result. Owns the Optuna journal."""

from archsearch.study.driver import Listener as Listener
from archsearch.study.driver import Study as Study
