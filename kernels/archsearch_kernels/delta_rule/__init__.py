"""The delta rule, plain (DeltaNet) or with a scalar decay per head (Gated DeltaNet)."""

from archsearch_kernels.delta_rule.reference import delta_rule as delta_rule
from archsearch_kernels.delta_rule.reference import delta_rule_recurrent as delta_rule_recurrent
from archsearch_kernels.delta_rule.reference import delta_rule_step as delta_rule_step
