"""transformers: the head of a causal language model, the hidden states that enter it, and training without noise.

    hidden = pk.last_hidden(model, input_ids, attention_mask)
    pk.linear_dpo_loss(hidden, targets=targets, ref_logps=ref, beta=0.1, **pk.head_of(model))

is right for any causal model: what its output layer does besides the matrix (a bias, a scale, a cap, a padded
vocabulary, an adapter) is found by running the model's own code, and compared with the model's own logits.
"""

from prefkern.integrations.transformers.head import ModelHead, ReferenceHead, head_of
from prefkern.integrations.transformers.hidden import last_hidden
from prefkern.integrations.transformers.lazy import LazyPatch, RealLogitsWarning, lazy_logits, patch, unpatch
from prefkern.integrations.transformers.noise import Quiet, without_noise

__all__ = [
    "LazyPatch",
    "ModelHead",
    "Quiet",
    "RealLogitsWarning",
    "ReferenceHead",
    "head_of",
    "last_hidden",
    "lazy_logits",
    "patch",
    "unpatch",
    "without_noise",
]
