// Vercel's AI SDK: a text, a stream with usage, a typed answer, a tool.

import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "labinfer",
  baseURL: process.env.OPENAI_BASE_URL,
  apiKey: process.env.OPENAI_API_KEY,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const ask = { model: provider(process.env.MODEL), prompt: "Name a city.", temperature: 0, maxRetries: 0 };
const City = z.object({ name: z.enum(["Rome", "Oslo"]) });

const answer = await generateText({ ...ask, maxOutputTokens: 8 });
assert.ok(answer.text);

const stream = streamText({ ...ask, maxOutputTokens: 8 });
const texts = [];
for await (const text of stream.textStream) texts.push(text);
assert.equal(texts.join(""), answer.text);
assert.equal((await stream.usage).outputTokens, answer.usage.outputTokens);

const typed = await generateText({ ...ask, maxOutputTokens: 60, output: Output.object({ schema: City }) });
assert.ok(["Rome", "Oslo"].includes(typed.output.name));

const weather = tool({ description: "The weather of a city.", inputSchema: City });
const called = await generateText({ ...ask, maxOutputTokens: 200, tools: { weather }, toolChoice: "required" });
assert.equal(called.toolCalls[0].toolName, "weather");
assert.ok(["Rome", "Oslo"].includes(called.toolCalls[0].input.name));
