"""The stages of a job and of the loop, with the transitions between them."""

from __future__ import annotations

from enum import Enum, IntEnum


class JobStage(Enum):
    """Where a job stands in the device loop.

        WAITING  -> RUNNING     it gets its first slot here (`Submission.start`)
        RUNNING  -> PARKED      its state leaves the slot (`Submission.park`)
        RUNNING  -> RETRYING    a device program failed on its tick, or its image was not finite (`Submission.retry`)
        PARKED   -> RUNNING     it gets a slot again (`Submission.start`)
        PARKED   -> RETRYING    its snapshot was lost on the way to the host (`Submission.retry`)
        RETRYING -> RUNNING     it gets a slot for another try (`Submission.start`)
        any      -> ENDED       its future has a result or an exception (`Submission.settle`)

    The loop's thread makes all transitions but the last, which any thread may make, and which is final.
    """

    WAITING = "waiting"
    RUNNING = "running"
    PARKED = "parked"
    RETRYING = "retrying"
    ENDED = "ended"


class LoopStage(IntEnum):
    """How far a device loop is on the way to its end. A loop only moves down this list, and may skip stages.

        RUNNING     it accepts jobs and plans ticks
        DRAINING    `DeviceLoop.drain` set a deadline: the loop hands over the jobs that cannot be done in time
        PARKING     the deadline has passed: the loop's thread brings the state of every running job to the host, plans
                    nothing and hands every job over
        CLOSED      `DeviceLoop.close` ended every job that was left; the loop refuses new jobs
        GIVEN_UP    the devices are lost or hang, or a thread does not end: every job was handed over, and so is every
                    new one

    The loop's thread enters PARKING, and GIVEN_UP when the devices are lost; the watching thread enters GIVEN_UP when
    they hang; the threads that call `drain` and `close` enter the stages of these.
    """

    RUNNING = 0
    DRAINING = 1
    PARKING = 2
    CLOSED = 3
    GIVEN_UP = 4
