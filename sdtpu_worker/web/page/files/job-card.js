// One job's card. It is there before the server has answered, fills with the forming picture, and says how it ended.

import {image} from "./api.js"
import {doneIn, fileName, settingsOf, stateOf} from "./words.js"

const template = document.getElementById("card").content
const nearby = new IntersectionObserver(seen => {
  for (const {isIntersecting, target} of seen) {
    if (!isIntersecting) continue
    nearby.unobserve(target)
    cards.get(target)?.showPicture()
  }
}, {rootMargin: "300px"})
const cards = new WeakMap()

export const ENDED = ["succeeded", "failed", "cancelled", "expired", "refused"]

export class Card {
  // `job` is one of the API's, or one that is only about to be sent: it has parameters and no id.
  constructor(job) {
    this.item = template.cloneNode(true).firstElementChild
    this.part = name => this.item.querySelector(name)
    this.picture = this.part(".picture")
    this.job = job
    cards.set(this.item, this)
    const {width = 1, height = 1} = job.parameters
    this.part(".frame").style.aspectRatio = `${width} / ${height}`
    this.part(".what").textContent = this.picture.alt = job.parameters.prompt
    this.part(".frame").setAttribute("aria-label", `Show large: ${job.parameters.prompt}`)
    this.show(job)
  }

  get id() { return this.job.id }
  get hasEnded() { return ENDED.includes(this.job.status) }

  show(job, wait = this.wait, workers = this.workers) {
    Object.assign(this, {job, wait, workers})
    if (job.id) this.item.id = `job-${job.id}`
    const {status} = job
    this.item.dataset.status = status
    this.part("progress").value = status === "succeeded" ? 100 : job.progress?.percent ?? 0
    this.part(".state").textContent = this.words()
    this.part(".settings").textContent = settingsOf(job.parameters, job.result)
    this.part("progress").hidden = this.hasEnded
    const buttons = {
      cancel: !this.hasEnded && job.id,
      retry: this.hasEnded && canRepeat(job),
      download: status === "succeeded" && this.url,
      edit: true,
      copy: navigator.clipboard,  // which browsers have at https and at localhost only
    }
    for (const [name, isShown] of Object.entries(buttons)) this.button(name).hidden = !isShown
    this.button("retry").textContent = status === "succeeded" ? "New seed" : "Try again"
    if (status === "succeeded" && !this.url) nearby.observe(this.item)
  }

  words() {
    const {status, progress, error} = this.job
    if (status === "sending") return this.job.isLate ? "waiting for the connection" : "sending"
    if (status === "failed" || status === "refused") return `Failed: ${error?.detail ?? "the server does not say why"}`
    if (status === "cancelled") return error?.type === "TaskRevokedError" && /expire/.test(error.detail) ? "Expired before it was its turn" : "Cancelled"
    if (status === "expired") return "Expired: the server keeps pictures for a while only"
    return status === "succeeded" ? doneIn(this.job.result) : stateOf(status, progress, this.wait, this.workers)
  }

  button(name) { return this.part(`[data-does=${name}]`) }

  progress(data) {
    this.show({...this.job, status: data.status, progress: data})
  }

  // Show the forming picture; returns its address.
  preview(data) {
    if (!this.url) {
      this.picture.src = `data:image/png;base64,${data.b64_json}`
      this.picture.hidden = false
    }
    return this.picture.src
  }

  async showPicture() {
    if (this.url || this.job.status !== "succeeded") return
    try {
      const blob = await image(`/${this.id}/image`)
      this.url = URL.createObjectURL(blob)
      this.picture.classList.add("done")
      this.picture.classList.toggle("small", this.job.result.image.width <= 128)
      this.picture.src = this.url
      this.picture.hidden = this.part(".frame").disabled = false
      Object.assign(this.button("download"), {href: this.url, download: fileName(this.job)})
      this.show(this.job)
    } catch (problem) {
      if (problem.status === 404 || problem.status === 410) this.show({...this.job, status: "expired"})
      else nearby.observe(this.item)
    }
  }
}

// Pictures that a job started from are not told, so such a job can only be sent again by the page that has them.
const canRepeat = job => job.sent || !Object.values(job.parameters).includes("a picture")
