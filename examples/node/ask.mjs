// A client in Node, with mqtt and @msgpack/msgpack, written from docs/protocol.md: npm ci, then node ask.mjs URL CLUSTER AGENT TEXT

import { randomUUID } from 'node:crypto'
import { decode, encode } from '@msgpack/msgpack'
import mqtt from 'mqtt'

const [url, cluster, agent, text] = process.argv.slice(2)
if (text === undefined) {
  console.error('usage: node ask.mjs URL CLUSTER AGENT TEXT')
  process.exit(2)
}
const PATIENCE_MS = 60_000
const AWAY_MS = 5_000
const topic = `fedhlm/1/c/${cluster}/a/${agent}`
const name = `guest-${randomUUID().slice(0, 8)}`
// Tag 2, schema version, sender, running number, Unix time; request, text, max_tokens, seed. The rest is left at its defaults.
const prompt = [2, 3, name, 1, Date.now(), name, text, 32, 7]

// Tag 1: if this program dies, the broker tells the agent, which stops writing for it.
const gone = [1, 3, name, 2, Date.now(), 'client', false, 'third party']
const will = { topic: `fedhlm/1/client/${name}/status`, payload: Buffer.from(encode(gone)), qos: 1, retain: false }

const client = mqtt.connect(url, { clientId: name, protocolVersion: 5, reconnectPeriod: 0, will })
const end = (status, error) => {
  if (error) console.error(error)
  client.end(true, {}, () => process.exit(status))
}
let timer = setTimeout(() => end(1, `${agent} is not online in ${cluster}`), AWAY_MS)
let asked = false
let position = 0
const early = new Map() // outputs that came before the one they follow

client.on('error', (error) => end(1, `${url}: ${error.code ?? error.message}`))
client.on('connect', () => client.subscribe([`${topic}/status`, `${topic}/to/${name}/output`], { qos: 1 }))
client.on('message', (from, payload) => {
  const message = decode(payload)
  if (from === `${topic}/status`) {
    const online = message[6]
    if (online && !asked) {
      asked = true
      client.publish(`${topic}/from/${name}/prompt`, encode(prompt), { qos: 1 })
    } else if (!online && asked) {
      return end(1, `${agent} has gone offline`)
    }
    if (!asked) return
  }
  clearTimeout(timer)
  timer = setTimeout(() => end(1, `${agent} is silent`), PATIENCE_MS)
  if (from.endsWith('/output')) take(message)
})

function take(output) {
  const [request, start, , , , finish, error] = output.slice(5)
  const refusal = output[14]
  if (request !== name) return
  if (refusal) return end(1, error)
  early.set(`${start} ${finish !== null}`, output)
  for (;;) {
    const next = early.get(`${position} false`) ?? early.get(`${position} true`)
    if (!next) return
    early.delete(`${position} ${next[10] !== null}`)
    process.stdout.write(next[9])
    position += next[7].length
    if (next[10] !== null) {
      process.stdout.write('\n')
      return end(['error', 'cancelled'].includes(next[10]) ? 1 : 0, next[11])
    }
  }
}
