"""Objectives: modules that turn a batch into a loss and own a backbone; and the protocols that judge them."""

from leaven.pretext.evaluation import (
    extract_features,
    few_label_probe,
    few_protocol,
    knn,
    knn_protocol,
    linear_probe,
    linear_probs,
    linear_protocol,
    recalibrate_batchnorm,
)
from leaven.pretext.output import Output
from leaven.pretext.rotation_cues import CueAudit, Rotate4, check_order, cue_audit
from leaven.pretext.rotnet import (
    Auxiliary,
    RotNet,
    clockwise_head,
    rotate4,
    rotate_random,
    rotation_ood_score,
)
from leaven.pretext.scalekd import NoTail, ScaleKD, TeacherTail
from leaven.pretext.spark import SparK, SparseUnsupported, UntrainedWarning
from leaven.pretext.stage_probe import kshot_indices, pooled_maps, probe_stages
from leaven.pretext.supervised import Supervised, count_correct

__all__ = [
    "Auxiliary",
    "CueAudit",
    "NoTail",
    "Output",
    "RotNet",
    "Rotate4",
    "ScaleKD",
    "SparK",
    "SparseUnsupported",
    "Supervised",
    "TeacherTail",
    "UntrainedWarning",
    "check_order",
    "clockwise_head",
    "count_correct",
    "cue_audit",
    "extract_features",
    "few_label_probe",
    "few_protocol",
    "knn",
    "knn_protocol",
    "kshot_indices",
    "linear_probe",
    "linear_probs",
    "linear_protocol",
    "pooled_maps",
    "probe_stages",
    "recalibrate_batchnorm",
    "rotate4",
    "rotate_random",
    "rotation_ood_score",
]
