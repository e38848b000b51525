// What the page says of numbers and states.

export const seconds = value =>
  value == null ? "" : value < 1 ? "under 1 s" : value < 90 ? `${Math.round(value)} s` : value < 5400 ? `${Math.round(value / 60)} min` : `${(value / 3600).toFixed(1)} h`

const ready = eta => (eta == null ? "" : ` · ready in ${seconds(eta)}`)

// How far an unfinished job is: `wait` is its place in the queue where it still lies there, `workers` how many there are.
export function stateOf(status, progress, wait, workers) {
  if (workers === 0) return "waiting for a worker to start"
  if (status === "running" && !progress?.pending) return progress?.percent == null ? "starting" : `${progress.percent} %${ready(progress.eta_s)}`
  if (progress?.pending) return `next for a slot${ready(progress.eta_s)}`
  if (wait) return (wait.ahead ? `${wait.ahead} ahead in the queue` : "first in the queue") + ready(wait.eta_s)
  return "in the queue"
}

export const doneIn = result => (result.reused ? "found among those drawn before" : `drawn in ${seconds(result.timings.total_s)}`)

export function settingsOf(parameters, result) {
  const at = name => result?.[name] ?? parameters[name]
  const {width, height} = result?.image ?? parameters
  return [
    width && `${width} × ${height}`,
    at("num_inference_steps") && `${at("num_inference_steps")} steps`,
    at("sampler"),
    at("guidance_scale") != null && `guidance ${at("guidance_scale")}`,
    parameters.seed_text && `seed ${parameters.seed_text}`,
  ].filter(Boolean).join(" · ")
}

export const fileName = job => {
  const words = job.parameters.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 50)
  return `${words || "picture"}-${job.parameters.seed_text ?? "0"}.${job.result?.image.format ?? "png"}`
}
