"""The moments of a job's way at which `dying_worker` can end its process, and what has happened by then.

waiting        a thread has the job, no slot
encoding       it gets its slot
denoising      it has done some of its steps
decoding       the devices make its picture
storing        its image is about to be stored
stored         its image is stored, its result is not
announced      the tasks linked to it are sent, its result is not stored
counting       its result is stored, the chord that it is part of does not know yet
done           its result is stored, its message is not acknowledged
"""

from __future__ import annotations

PHASES = ("waiting", "encoding", "denoising", "decoding", "storing", "stored", "announced", "done")
"""Those of a job that is in no chord, in their order."""
EVENTS = ("slot given", "steps taken", "decoding", "picture made", "image stored", "links sent", "result stored")
"""What lies between two phases: in phase number n, the first n of these have happened and no other one."""
LINKS = "links"
"""The queue of the tasks that a test links to a job to see when they are sent; nobody consumes it."""
