"""What a run leaves on disk and how it is read back: records, the run folder, provenance."""

from archsearch.store.folder import RunFolder as RunFolder
from archsearch.store.folder import sync_path as sync_path
from archsearch.store.provenance import environment as environment
from archsearch.store.record import Measured as Measured
from archsearch.store.record import TrialRecord as TrialRecord
from archsearch.store.record import now as now
