// The cards of `{% sdtpu_card %}`: each shows one job's progress, and then its image.

const PAUSE_MS = 700
const LONGEST_PAUSE_MS = 10000

export function watch(card) {
  const part = name => card.querySelector(name)
  const [bar, line, image, button] = [part("progress"), part(".sdtpu-state"), part("img"), part(".sdtpu-cancel")]
  const place = card.dataset.sdtpuJob

  function show(status, progress) {
    const percent = status === "succeeded" ? 100 : progress?.percent ?? 0
    bar.value = percent
    line.textContent = status === "running" ? `${percent} %${eta(progress)}` : status
  }

  function eta(progress) {
    return progress?.eta_s == null ? "" : `, ready in ${Math.ceil(progress.eta_s)} s`
  }

  function showImage(source) {
    image.src = source
    image.hidden = false
  }

  function showJob(job) {
    show(job.status, job.progress)
    const hasEnded = job.status !== "queued" && job.status !== "running"
    if (job.links.image) showImage(job.links.image)
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
    events.addEventListener("preview", event => showImage(`data:image/png;base64,${JSON.parse(event.data).b64_json}`))
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
