// The page: the form sends jobs, the gallery shows them, the strip shows the devices.

import {ask, key, Problem} from "./api.js"
import * as form from "./form.js"
import {Card} from "./job-card.js"
import {Live} from "./live.js"
import {paint, showBatch} from "./strip.js"

const $ = id => document.getElementById(id)
const PAGE = 50, SERVED_EVERY_MS = 30000
const SENDING = "sdtpu-sending"
const gallery = $("gallery")
const cards = new Map()  // by the job's id
let workers = null, before = null

// The gallery

function put(job, isOld = false) {
  const known = cards.get(job.id)
  if (known) {
    if (!known.hasEnded || job.status !== known.job.status) end(known, job)
    return
  }
  const card = new Card(job)
  card.workers = workers
  cards.set(job.id, card)
  isOld ? gallery.append(card.item) : gallery.prepend(card.item)
}

function end(card, job) {
  const hadEnded = card.hasEnded
  card.show({sent: card.job.sent, ...job})
  if (card.hasEnded && !hadEnded) {
    announce(job)
    follow()
  }
}

const announce = job =>
  ($("announcer").textContent = `${{succeeded: "Done", failed: "Failed", cancelled: "Cancelled"}[job.status] ?? job.status}: ${job.parameters.prompt}`)

function follow() {
  const open = [...cards.values()].filter(card => !card.hasEnded)
  live.follow(open.sort((a, b) => a.job.created_at - b.job.created_at).map(card => card.id))
  document.title = open.length ? `(${open.length}) Pictures` : "Pictures"
  $("empty").hidden = gallery.childElementCount > 0
}

async function lookAtList() {
  const {jobs, next} = await ask(`?limit=${PAGE}`)
  const isFirst = before === null
  showList(jobs)
  for (const card of cards.values()) if (!card.hasEnded && !jobs.some(job => job.id === card.id)) await lookAtJob(card)
  if (isFirst) showOlderButton(next)
}

async function lookAtJob(card) {
  try {
    end(card, await ask(`/${card.id}`))
  } catch (problem) {
    if (problem.status !== 404) throw problem
    end(card, {...card.job, status: "expired"})
  }
}

function showList(jobs) {
  for (const job of [...jobs].reverse()) put(job)
  follow()
}

function showOlderButton(next) {
  before = next ?? ""
  $("older").hidden = !next
}

$("older").addEventListener("click", () => guarded(async () => {
  const {jobs, next} = await ask(`?limit=${PAGE}&before=${before}`)
  for (const job of jobs) put(job, true)
  showOlderButton(next)
  follow()
}))

gallery.addEventListener("click", event => {
  const control = event.target.closest("[data-does], .frame")
  const card = [...cards.values(), ...waiting].find(each => each.item.contains(control))
  if (!control || !card) return
  if (control.classList.contains("frame")) enlarge(card)
  else does[control.dataset.does]?.(card, control)
})

const does = {
  cancel: (card, button) => guarded(async () => {
    button.disabled = true
    try {
      end(card, await ask(`/${card.id}`, {method: "DELETE"}))
      card.item.focus({preventScroll: true})
    } finally {
      button.disabled = false
    }
  }),
  retry: card => {
    const {seed, seed_text, priority, tenant, ...parameters} = card.job.sent ?? card.job.parameters
    submit(parameters)
    window.scrollTo({top: 0})
  },
  edit: card => form.fill(card.job.parameters),
  copy: async (card, button) => {
    const {seed_text, priority, tenant, ...parameters} = card.job.parameters
    await navigator.clipboard.writeText(JSON.stringify({...parameters, seed: Number.isSafeInteger(parameters.seed) ? parameters.seed : seed_text}, null, 2))
    button.textContent = "Copied"
    setTimeout(() => (button.textContent = "Copy"), 2000)
  },
}

function enlarge(card) {
  Object.assign($("viewer-image"), {src: card.url, alt: card.job.parameters.prompt, className: card.picture.className})
  $("viewer-text").textContent = `${card.job.parameters.prompt} — ${card.part(".settings").textContent}`
  $("viewer").showModal()
}

// Sending. A job that could not be sent is sent again with the same key, which makes it one job, also after a reload.

const waiting = new Set()
const kept = () => JSON.parse(sessionStorage.getItem(SENDING) ?? "{}")
const keep = all => {
  try {
    sessionStorage.setItem(SENDING, JSON.stringify(all))
  } catch { /* it is full: a reload then forgets what could not be sent */ }
}

function submit(parameters, once = newKey()) {
  const shown = Object.fromEntries(Object.entries(parameters).map(([name, value]) => [name, String(value).startsWith("data:") ? "a picture" : value]))
  const card = new Card({status: "sending", parameters: shown, sent: parameters})
  waiting.add(card)
  gallery.prepend(card.item)
  $("empty").hidden = true
  keep({...kept(), [once]: parameters})
  return sendCard(card, parameters, once)
}

async function sendCard(card, parameters, once) {
  let answer
  for (let ms = 500; !answer; ms = Math.min(2 * ms, 5000)) {
    try {
      answer = await ask("", {method: "POST", body: parameters, headers: {"Idempotency-Key": once}})
    } catch (problem) {
      if (problem.status === 401) await askForKey(problem)
      else if (problem.status === 0 || problem.code === "InProgress") {
        card.show({...card.job, isLate: true})
        await new Promise(done => setTimeout(done, ms))
      } else {
        forget(card, once)
        card.show({...card.job, status: "refused", error: {detail: problem.message}})
        return problem
      }
    }
  }
  forget(card, once)
  const known = cards.get(answer.id)
  if (known) card.item.remove()  // a list has brought it meanwhile
  else cards.set(answer.id, card)
  ;(known ?? card).show({...answer, sent: parameters}, null, workers)
  follow()
}

const newKey = () => Array.from(crypto.getRandomValues(new Uint32Array(4)), part => part.toString(36)).join("-")

function forget(card, once) {
  waiting.delete(card)
  const {[once]: _, ...rest} = kept()
  keep(rest)
}

async function sendForm() {
  form.clearErrors()
  for (const refused of gallery.querySelectorAll(".card[data-status=refused]")) refused.remove()
  const parameters = await form.read()
  const count = form.count()
  if (!Number.isInteger(count) || count < 1 || count > 16) return form.showError("Pictures must be 1 to 16.", "count")
  const seed = parameters.seed
  const sent = Array.from({length: count}, (_, i) => submit(i && Number.isSafeInteger(seed) ? {...parameters, seed: seed + i} : parameters))
  const problem = (await Promise.all(sent)).find(Boolean)
  if (problem) form.showError(problem.message, problem.param)
}

// What is served, and the connection

async function lookAtServed() {
  const served = await ask("/capabilities")
  workers = served.workers
  $("model").textContent = served.model ?? ""
  $("small-world").hidden = !served.model?.startsWith("embedded")
  form.offer(served)
}

function connection(state, words) {
  if ($("connection").textContent === words) return
  $("connection").textContent = words
  $("connection").dataset.state = $("hosts").dataset.connection = state
}

const live = new Live({
  began: () => Promise.all([lookAtList(), lookAtServed()]),
  connected: () => connection("on", "live"),
  lost: problem => {
    if (problem.status === 401) askForKey(problem).then(() => live.start())
    else connection("off", problem.status === 403 ? problem.message : "connection lost, trying again")
  },
  asked: jobs => {
    showList(jobs)
    for (const {id, preview} of jobs) if (preview) paint(id, cards.get(id).preview(preview))
  },
  event: (name, data) => {
    if (name === "batch") onBatch(data)
    const card = cards.get(data.id)
    if (card) ({progress: () => card.progress(data), preview: () => paint(card.id, card.preview(data)), done: () => end(card, data)})[name]?.()
  },
})

function onBatch(batch) {
  showBatch(batch, id => cards.get(id)?.picture.src)
  const isNew = batch.known && batch.hosts.length !== workers
  if (batch.known) workers = batch.hosts.length
  if (isNew) guarded(lookAtServed)
  for (const card of cards.values()) if (!card.hasEnded) card.show(card.job, batch.waits[card.id], workers)
}

let asking = null
function askForKey(problem) {
  if (!problem.asksForKey) {
    connection("off", problem.message)
    return new Promise(() => {})
  }
  $("key-error").textContent = key.get() ? problem.message : ""
  key.forget()
  connection("off", "a key is needed")
  asking ??= new Promise(done => {
    $("key-dialog").showModal()
    $("key-dialog").addEventListener("close", () => {
      key.set($("key").value.trim())
      $("key").value = ""
      $("forget-key").hidden = false
      asking = null
      done()
    }, {once: true})
  })
  return asking
}

$("key-dialog").addEventListener("cancel", event => event.preventDefault())
$("forget-key").addEventListener("click", () => {
  key.forget()
  sessionStorage.removeItem(SENDING)
  localStorage.removeItem("sdtpu-draft")
  location.reload()
})

async function guarded(work) {
  try {
    await work()
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem
    connection("off", problem.message)
  }
}

$("forget-key").hidden = !key.get()
form.begin(sendForm)
for (const [once, parameters] of Object.entries(kept())) submit(parameters, once)
live.start()
setInterval(() => document.hidden || guarded(lookAtServed), SERVED_EVERY_MS)
