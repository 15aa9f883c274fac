"""The language of space.yaml: an architecture with holes is read, checked, and sampled into Candidates without any.

The files in the order in which a space.yaml meets them:

    yaml_source   YAML with line numbers, and nothing hostile
    sections      what a file must look like
    holes         choice, range, log_range, and what fills them
    coverage      every option of every hole once, so that mistakes show
    alphabet      the named mixers and FFNs, while holes are filled
    layout        how names fill the depth
    share         edges across depth
    fill          holes and layout filled: a Candidate
    rules         the rule language
    explain       what is wrong, in sentences that begin with the line
    search_space  SearchSpace, which has all of it done: loading checks, sampling gives Candidates
"""

from archsearch.space.fill import Candidate as Candidate
from archsearch.space.search_space import Refusal as Refusal
from archsearch.space.search_space import SearchSpace as SearchSpace
