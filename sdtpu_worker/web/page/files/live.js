// What happens at this moment, over one stream for all of the page's unfinished jobs and the devices. It comes back by
// itself when it breaks. Where the server has no stream left, the page asks again and again instead.

import {ask, events} from "./api.js"

const MOST_JOBS = 50
const ASK_MS = 1500, SILENT_MS = 40000, RETRY_MS = [300, 1000, 2000, 5000]
const pause = ms => new Promise(done => setTimeout(done, ms))

export class Live {
  #ids = []
  #lastId = ""
  #running = null
  #failures = 0

  // `on` has: event(name, data), asked(jobs), connected(), lost(problem), began() to look at the list again.
  constructor(on) {
    this.on = on
    document.addEventListener("visibilitychange", () => (document.hidden ? this.stop() : this.start()))
  }

  // Follow these jobs from now on.
  follow(ids) {
    const named = ids.slice(0, MOST_JOBS)
    if (named.join() === this.#ids.join()) return
    const isMore = named.some(id => !this.#ids.includes(id))
    this.#ids = named
    if (isMore && this.#running) this.start(false)
  }

  start(isNew = true) {
    this.#running?.abort()
    if (document.hidden) return
    this.#running = new AbortController()
    this.#run(this.#running.signal, isNew)
  }

  stop() {
    this.#running?.abort()
    this.#running = null
  }

  async #run(signal, isNew) {
    await pause(30)  // several new jobs make one stream
    while (!signal.aborted) {
      try {
        if (isNew) await this.on.began()
        isNew = true
        await this.#listen(signal)
      } catch (problem) {
        if (signal.aborted) return
        if (problem.code === "TooManyStreams") await this.#ask(signal)
        else if (problem.status === 401 || problem.status === 403) return this.on.lost(problem)
        else await this.#wait(problem)
      }
    }
  }

  async #listen(signal) {
    const broken = new AbortController()
    const both = AbortSignal.any([signal, broken.signal])
    let timer
    const heard = () => {
      clearTimeout(timer)
      timer = setTimeout(() => broken.abort(), SILENT_MS)
    }
    heard()
    try {
      for await (const event of events(`/events?ids=${this.#ids.join()}`, {lastId: this.#lastId, signal: both})) {
        if (signal.aborted) return
        heard()
        this.#failures = 0
        this.on.connected()
        if (!event) continue
        this.#lastId = event.id ?? this.#lastId
        this.on.event(event.name, event.data)
      }
    } finally {
      clearTimeout(timer)
    }
  }

  async #ask(signal) {
    for (let round = 0; round < 20 && !signal.aborted; round++) {
      const [list, batch] = await Promise.all([ask("?limit=50&previews=true"), ask(`/batch?ids=${this.#ids.join()}`)])
      if (signal.aborted) return
      this.on.connected()
      this.on.asked(list.jobs)
      this.on.event("batch", batch)
      await pause(ASK_MS)
    }
  }

  async #wait(problem) {
    const ms = RETRY_MS[Math.min(this.#failures++, RETRY_MS.length - 1)]
    if (this.#failures > 1) this.on.lost(problem)
    await pause(ms)
  }
}
