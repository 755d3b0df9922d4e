"""Models that peft has adapted: `fastpeft.patch(peft_model)` leaves classes, parameters, names and files to peft, and
takes over the arithmetic."""

from fastpeft.integrations.peft.model import is_swapped, patch_peft, report_peft, unpatch_peft
from fastpeft.integrations.peft.wrap import wrapped_by_peft

__all__ = ["is_swapped", "patch_peft", "report_peft", "unpatch_peft", "wrapped_by_peft"]
