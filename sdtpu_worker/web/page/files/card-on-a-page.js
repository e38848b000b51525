// The cards of `{% sdtpu_card %}`, on pages of a Django project: each shows one job's progress, and then its image.

import {stateOf} from "./words.js"

const PAUSE_MS = 700
const LONGEST_PAUSE_MS = 10000
const ENDED = ["succeeded", "failed", "cancelled"]

export function watch(card) {
  const part = name => card.querySelector(name)
  const [bar, line, image, button] = [part("progress"), part(".sdtpu-state"), part("img"), part(".sdtpu-cancel")]
  const place = card.dataset.sdtpuJob

  function show(status, progress) {
    const percent = status === "succeeded" ? 100 : progress?.percent ?? 0
    bar.value = percent
    line.textContent = ENDED.includes(status) ? status : stateOf(status, progress)
  }

  function showImage(source) {
    image.src = source
    image.hidden = false
  }

  const showPreview = preview => showImage(`data:image/png;base64,${preview.b64_json}`)

  function showJob(job) {
    show(job.status, job.progress)
    const hasEnded = ENDED.includes(job.status)
    if (job.links.image) showImage(job.links.image)
    else if (job.preview) showPreview(job.preview)
    if (job.error) line.textContent = `${job.status}: ${job.error.detail}`
    if (hasEnded) button.hidden = true
    return hasEnded
  }

  async function ask(pause) {
    let next = pause
    try {
      const answer = await fetch(place)  // the browser's cache names the ETag of what it has
      if (answer.status === 404) return void (line.textContent = "gone")
      if (answer.ok && showJob(await answer.json())) return
      next = answer.ok ? PAUSE_MS : Math.min(2 * pause, LONGEST_PAUSE_MS)
    } catch {
      next = Math.min(2 * pause, LONGEST_PAUSE_MS)
    }
    setTimeout(ask, next, next)
  }

  function listen() {
    const events = new EventSource(`${place}/events`)
    events.addEventListener("progress", event => {
      const progress = JSON.parse(event.data)
      show(progress.status, progress)
    })
    events.addEventListener("preview", event => showPreview(JSON.parse(event.data)))
    events.addEventListener("done", event => {
      events.close()
      showJob(JSON.parse(event.data))
    })
    events.onerror = () => {
      if (events.readyState !== EventSource.CLOSED) return  // it comes back by itself
      ask(PAUSE_MS)  // too many streams are open
    }
  }

  button.addEventListener("click", async () => {
    button.disabled = true
    const answer = await fetch(place, {method: "DELETE", headers: {"X-CSRFToken": card.dataset.sdtpuCsrf}})
    if (answer.ok) showJob(await answer.json())
    else button.disabled = false
  })

  if (card.dataset.sdtpuDone !== undefined) return
  if (card.dataset.sdtpuLive !== undefined) listen()
  else ask(PAUSE_MS)
}

for (const card of document.querySelectorAll("[data-sdtpu-job]")) watch(card)
