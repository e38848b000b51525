// How the page asks the jobs API. The key is kept in this tab alone, and goes into a header, never into an address.

const JOBS = new URL("..", document.baseURI).pathname.replace(/\/$/, "")
const KEY = `sdtpu-key:${JOBS}`
const csrf = document.querySelector("meta[name=csrf-token]").content

// A refusal of the server in its own words; `param` names the field at fault. Status 0: it could not be reached.
export class Problem extends Error {
  constructor(status, {code = "", detail = "", param = ""} = {}, asksForKey = false) {
    super(detail || (status ? `The server answered ${status}.` : "The server cannot be reached."))
    Object.assign(this, {status, code, param, asksForKey})
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: value => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
}

async function send(path, {method = "GET", headers = {}, body, signal} = {}) {
  const all = {...headers}
  if (key.get()) all.Authorization = `Bearer ${key.get()}`
  if (csrf) all["X-CSRFToken"] = csrf
  if (body !== undefined) all["Content-Type"] = "application/json"
  let answer
  try {
    answer = await fetch(JOBS + path, {method, headers: all, signal, body: body === undefined ? undefined : JSON.stringify(body)})
  } catch (error) {
    if (signal?.aborted) throw error
    throw new Problem(0)
  }
  if (answer.ok) return answer
  const isProblem = answer.headers.get("Content-Type")?.startsWith("application/problem+json")
  const asksForKey = answer.status === 401 && /^bearer/i.test(answer.headers.get("WWW-Authenticate") ?? "")
  throw new Problem(answer.status, isProblem ? await answer.json() : {}, asksForKey)
}

export const ask = async (path, options) => (await send(path, options)).json()

export const image = async path => (await send(path)).blob()

// Yields the server-sent events of a stream as {name, id, data}; comments as null, so that silence can be told.
export async function* events(path, {lastId, signal}) {
  const headers = {Accept: "text/event-stream", ...(lastId ? {"Last-Event-ID": lastId} : {})}
  const answer = await send(path, {headers, signal})
  if (answer.status === 204) return
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader()
  let text = ""
  try {
    for (;;) {
      const {done, value} = await reader.read()
      if (done) return
      text += value
      const parts = text.split("\n\n")
      text = parts.pop()
      for (const part of parts) yield parse(part)
    }
  } finally {
    reader.cancel().catch(() => {})
  }
}

function parse(part) {
  const fields = {}
  for (const line of part.split("\n")) {
    const at = line.indexOf(": ")
    if (at > 0) fields[line.slice(0, at)] = line.slice(at + 2)
  }
  return fields.data === undefined ? null : {name: fields.event, id: fields.id, data: JSON.parse(fields.data)}
}
