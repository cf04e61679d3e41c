// Prints what AsyncAPI's own parser finds in a document, as JSON: its version, and errors and warnings with their place.

import { readFileSync } from 'node:fs'
import { Parser } from '@asyncapi/parser'

const { document, diagnostics } = await new Parser().parse(readFileSync(process.argv[2], 'utf8'))
const found = diagnostics.map((one) => ({ severity: one.severity, code: one.code, text: one.message, path: one.path.join('.') }))
console.log(JSON.stringify({ version: document?.version() ?? null, messages: document?.allMessages().length ?? 0, found }))
