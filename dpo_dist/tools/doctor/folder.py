"""The files of the doctor."""

from dpo_dist.kit import PathBelow, RunFolder


class DoctorFolder(RunFolder):
    """A run directory with what the doctor writes."""

    doctor_report = PathBelow("doctor/doctor.json")
    doctor_page = PathBelow("doctor/doctor.html")
