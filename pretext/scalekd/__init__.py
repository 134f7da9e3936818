"""ScaleKD: any vision transformer as the teacher of any student (Fan et al., NeurIPS 2024)."""

from leaven.pretext.scalekd.cache import CachedTargets, write_targets
from leaven.pretext.scalekd.projector import CrossAttentionProjector
from leaven.pretext.scalekd.scalekd import ScaleKD
from leaven.pretext.scalekd.tail import NoTail, Targets, TeacherTail
from leaven.pretext.scalekd.taps import Tap, find_taps, tapped, two_stages
from leaven.pretext.scalekd.views import frequency_view_loss, remove_dc, spatial_view_loss

__all__ = [
    "CachedTargets",
    "CrossAttentionProjector",
    "NoTail",
    "ScaleKD",
    "Tap",
    "Targets",
    "TeacherTail",
    "find_taps",
    "frequency_view_loss",
    "remove_dc",
    "spatial_view_loss",
    "tapped",
    "two_stages",
    "write_targets",
]
