// The form: what this deployment serves is what it offers, and the server's own words stand beside the field at fault.

import {element} from "./strip.js"

const form = document.getElementById("composer")
const field = name => form.elements[name]
const DRAFT = "sdtpu-draft"
const KEPT = ["prompt", "size", "num_inference_steps", "count", "sampler", "guidance_scale", "seed", "image_format", "negative_prompt"]
const NUMBERS = ["num_inference_steps", "guidance_scale", "strength"]
const PICTURES = ["image", "mask_image", "control_image"]

export function offer(served) {
  choices("size", served.sizes.map(({width, height}) => [`${width}x${height}`, `${width} × ${height}`]))
  choices("sampler", served.samplers.map(name => [name, name === served.default_sampler ? `${name} (the model’s own)` : name]))
  const {steps, guidance} = served
  if (steps.default) field("num_inference_steps").placeholder = String(steps.default)
  if (guidance.default != null) field("guidance_scale").placeholder = String(guidance.default)
  shown("guidance_scale", served.workers === 0 || guidance.maximum > 1)
  document.getElementById("negative-field").hidden = served.workers > 0 && !served.negative_prompt
  offerLoras(served.loras)
  document.getElementById("image-field").hidden = served.pictures === "none"
  document.getElementById("mask-field").hidden = !["start", "inpaint"].includes(served.pictures)
  document.getElementById("strength-field").hidden = served.pictures === "edit"
  document.getElementById("controlnet-field").hidden = !served.controlnets.length
  choices("controlnet", served.controlnets.map(name => [name, name]), 0)
}

const shown = (name, isShown) => (field(name).closest(".field").hidden = !isShown)

function choices(name, pairs, kept = 1) {
  const select = field(name)
  const chosen = select.value || select.dataset.wanted || ""
  select.replaceChildren(...[...select.options].slice(0, kept), ...pairs.map(([value, text]) => new Option(text, value)))
  select.value = pairs.some(([value]) => value === chosen) ? chosen : select.options[0]?.value ?? ""
}

function offerLoras({names, most_weight}) {
  const box = document.getElementById("loras")
  document.getElementById("loras-field").hidden = !names.length
  if ([...box.children].map(each => each.dataset.name).join() === names.join()) return
  box.replaceChildren(...names.map((name, number) => {
    const item = element("div", "field")
    item.dataset.name = name
    const input = element("input", "", {id: `lora-${number}`, inputmode: "decimal", placeholder: "off", autocomplete: "off",
                                        "aria-describedby": "loras-error", title: `a weight from −${most_weight} to ${most_weight}; empty: off`})
    item.append(element("label", "", {for: `lora-${number}`}, name), input)
    return item
  }))
}

// Returns the parameters of a job, as typed: what they may be the server says.
export async function read() {
  const parameters = {prompt: field("prompt").value, image_format: field("image_format").value}
  const [width, height] = field("size").value.split("x").map(Number)
  if (height) Object.assign(parameters, {width, height})
  for (const name of NUMBERS) if (field(name).value.trim()) parameters[name] = number(field(name).value)
  for (const name of ["sampler", "negative_prompt"]) if (field(name).value) parameters[name] = field(name).value
  if (field("seed").value.trim()) parameters.seed = seedOf(field("seed").value.trim())
  const loras = [...document.querySelectorAll("#loras .field")].map(each => [each.dataset.name, each.querySelector("input").value.trim()])
  const chosen = loras.filter(([, weight]) => weight).map(([name, weight]) => [name, number(weight)])
  if (chosen.length) parameters.loras = chosen
  for (const name of PICTURES) {
    const [file] = field(name).files
    if (file) parameters[name] = await dataUri(file)
  }
  if (parameters.control_image) parameters.controlnet = field("controlnet").value
  if (!parameters.image) delete parameters.strength
  return parameters
}

export const count = () => Number(field("count").value)

const number = text => (/^\s*[-+]?(\d+([.,]\d*)?|[.,]\d+)\s*$/.test(text) ? Number(text.replace(",", ".")) : text)
const seedOf = text => (/^\d{1,15}$/.test(text) ? Number(text) : text)

const dataUri = file => new Promise((done, failed) => {
  const reader = new FileReader()
  reader.onload = () => done(reader.result)
  reader.onerror = () => failed(reader.error)
  reader.readAsDataURL(file)
})

// Put a job's settings into the form.
export function fill(parameters) {
  const {width, height} = parameters
  const values = {...parameters, size: width ? `${width}x${height}` : "", seed: parameters.seed_text ?? parameters.seed}
  for (const name of KEPT) if (name !== "count") field(name).value = values[name] ?? (name === "image_format" ? "png" : "")
  const weights = Object.fromEntries((parameters.loras ?? []).map(each => (Array.isArray(each) ? each : [each, 1])))
  for (const item of document.querySelectorAll("#loras .field")) item.querySelector("input").value = weights[item.dataset.name] ?? ""
  document.getElementById("more").open ||= ["sampler", "guidance_scale", "negative_prompt"].some(name => values[name]) || parameters.loras?.length > 0
  clearErrors()
  keepDraft()
  field("prompt").focus()
}

export function clearErrors() {
  for (const text of form.querySelectorAll(".error")) text.textContent = ""
  for (const each of form.elements) each.removeAttribute("aria-invalid")
}

// Show the server's message beside the field that it names, else below the form; that field gets the focus.
export function showError(message, param) {
  const name = {width: "size", height: "size", prompt_2: "prompt"}[param] ?? param
  const place = document.getElementById(`${name}-error`)
  const input = document.getElementById(name)
  if (!place || !form.contains(place)) {
    document.getElementById("form-error").textContent = message
    return
  }
  place.textContent = message
  if (place.closest("details")) document.getElementById("more").open = true
  input?.setAttribute("aria-invalid", "true")
  input?.focus()
}

const keepDraft = () => localStorage.setItem(DRAFT, JSON.stringify(Object.fromEntries(KEPT.map(name => [name, field(name).value]))))

// Take up what was typed before a reload.
export function begin(onSend) {
  for (const [name, value] of Object.entries(JSON.parse(localStorage.getItem(DRAFT) ?? "{}"))) {
    if (!KEPT.includes(name)) continue
    field(name).value = value
    if (field(name).value !== value) field(name).dataset.wanted = value  // it is offered later
  }
  form.addEventListener("input", event => {
    keepDraft()
    event.target.removeAttribute("aria-invalid")
    document.getElementById(`${event.target.id}-error`)?.replaceChildren()
  })
  form.addEventListener("submit", event => {
    event.preventDefault()
    onSend()
  })
  field("prompt").addEventListener("keydown", event => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit()
  })
}
