// Browsers start no worker from a file on the disk. There the search runs in a hidden frame instead, which this makes look like a worker.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const inside = frame.contentWindow
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}))
      const script = inside.document.createElement("script")
      script.src = new URL(url, location.href).href
      const ready = new Promise(done => (script.onload = done))
      inside.document.body.append(script)
      this.postMessage = data => ready.then(() => inside.dispatchEvent(new inside.MessageEvent("message", {data})))
    }
  }
}
