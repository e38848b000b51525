// The strip of devices: who is in which slot. Slots of other callers say nothing but that they are busy.

const MOST_CELLS = 1024
const hosts = document.getElementById("hosts")
const occupancy = document.getElementById("occupancy")
let shape = ""

// `pictureOf` returns the forming picture of a job of one's own, or nothing.
export function showBatch(batch, pictureOf) {
  occupancy.textContent = words(batch)
  const cells = batch.hosts.flatMap(host => host.devices.flatMap(device => device.slots))
  const now = batch.hosts.map(host => host.devices.map(device => `${device.slots.length}${device.lost ? "!" : ""}`).join() || host.slots).join("/")
  if (now !== shape) {
    shape = now
    hosts.replaceChildren(...batch.hosts.map(host => drawHost(host, cells.length <= MOST_CELLS)))
  }
  batch.hosts.forEach((host, number) => {
    const meter = hosts.children[number].querySelector("meter")
    if (meter) meter.value = host.busy
  })
  hosts.querySelectorAll(".slot").forEach((cell, number) => fill(cell, cells[number], pictureOf))
}

function words(batch) {
  if (!batch.known) return "The server cannot see the devices at the moment."
  if (!batch.hosts.length) return "No worker is running. Pictures wait until one starts."
  const waiting = batch.waiting ? ` · ${batch.waiting.toLocaleString()} waiting` : ""
  return `${batch.busy} of ${batch.slots} slots busy${waiting}`
}

function drawHost(host, hasCells) {
  const box = element("section", "host", {"aria-label": host.name})
  box.append(element("h3", "", {}, host.name))
  if (!host.devices.length || !hasCells) {
    box.append(element("meter", "", {max: host.slots, "aria-label": `Busy slots of ${host.name}`}))
    return box
  }
  const devices = element("ol", "devices")
  devices.style.setProperty("--slots", host.devices[0].slots.length)
  host.devices.forEach((device, number) => {
    const item = element("li", device.lost ? "device lost" : "device", {title: device.lost ? `device ${number} is lost` : `device ${number}`})
    item.append(...device.slots.map(() => element("a", "slot")))
    devices.append(item)
  })
  box.append(devices)
  return box
}

function fill(cell, held, pictureOf) {
  const kind = held == null ? "free" : held === "busy" ? "busy" : "own"
  if (cell.dataset.kind === kind && (kind !== "own" || cell.hash === `#job-${held}`)) return
  cell.dataset.kind = kind
  cell.removeAttribute("href")
  cell.textContent = kind === "own" ? "your picture" : ""
  cell.style.backgroundImage = ""
  if (kind !== "own") return
  cell.href = `#job-${held}`
  const picture = pictureOf(held)
  if (picture) paint(held, picture)
}

// Show how far a job's picture is in its slot.
export function paint(id, picture) {
  const cell = hosts.querySelector(`[href="#job-${id}"]`)
  if (cell) cell.style.backgroundImage = `url("${picture}")`
}

export function element(name, className = "", attributes = {}, text = "") {
  const made = document.createElement(name)
  if (className) made.className = className
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value)
  made.textContent = text
  return made
}
